#!/bin/sh
# Link the images of CUB-200-2011 into train/<class>/ and test/<class>/, as its lists say; annotate the birds' boxes.
#
#     sh data/link_birds.sh CUB_200_2011
set -e
cd "$1"
paste -d ' ' images.txt train_test_split.txt bounding_boxes.txt | while read -r _ file _ is_train _ x y width height; do
    class=$(dirname "$file")
    folder=$([ "$is_train" = 1 ] && echo train || echo test)/$class
    mkdir -p "$folder" "Annotation/$class"
    ln -sf "$PWD/images/$file" "$folder"
    x=${x%.*} y=${y%.*}  # all are whole numbers, written as 60.0
    cat > "Annotation/${file%.*}" <<XML
<annotation><object><bndbox>
<xmin>$x</xmin><ymin>$y</ymin><xmax>$((x + ${width%.*}))</xmax><ymax>$((y + ${height%.*}))</ymax>
</bndbox></object></annotation>
XML
done
