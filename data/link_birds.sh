#!/bin/sh
# Link the images of CUB-200-2011 into train/<class>/ and test/<class>/, as its lists say.
#
#     sh data/link_birds.sh CUB_200_2011
set -e
cd "$1"
paste -d ' ' images.txt train_test_split.txt | while read -r _ file _ is_train; do
    folder=$([ "$is_train" = 1 ] && echo train || echo test)/$(dirname "$file")
    mkdir -p "$folder"
    ln -sf "$PWD/images/$file" "$folder"
done
