"""Download, verify and unpack Stanford Dogs (778 MiB): python data/stanford_dogs.py

Creates DATA_DIR/Images/<breed folder>/<file>.jpg, DATA_DIR/lists/{train,test,file}_list.mat and the boxes of the dogs,
DATA_DIR/Annotation/<breed folder>/<file>.
The same command resumes an interrupted run.
"""

import argparse
import hashlib
import http.client
import shlex
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


class Archive(NamedTuple):
    """An archive of the data set and its target folder; the archive contains either that folder or its contents."""

    name: str
    size: int  # bytes
    sha256: str
    folder: str


BASE_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
ARCHIVES = (
    Archive("lists.tar", 481280, "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c", "lists"),
    Archive(
        "annotation.tar", 21852160, "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd", "Annotation"
    ),
    Archive("images.tar", 793579520, "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58", "Images"),
)
CHUNK = 1 << 18  # bytes
TRIES = 5
PAUSE = 2.0  # seconds between two tries
TIMEOUT = 30.0  # seconds without receiving data


class DatasetError(Exception):
    """An error reported to the user in one line, without a traceback."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Download, verify and unpack Stanford Dogs.", allow_abbrev=False)
    parser.add_argument("--data_dir", type=Path, default=Path("data/Original"), help="output folder (%(default)s)")
    parser.add_argument("--base_url", default=BASE_URL, help="URL of the folder with the archives (%(default)s)")
    return parser.parse_args(argv)


def bytes_in(path: Path) -> int:
    """Size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def fetch(url: str, part: Path, size: int) -> None:
    """Send one request for the missing bytes of `part`, `size` bytes in total, and append the response to it.

    Raises DatasetError, with `part` unchanged, if the server's file has a different size, and urllib's errors.
    """
    have = bytes_in(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == 206
        if resumed:
            offered = response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            have, offered = 0, response.headers.get("Content-Length", "")
        if offered.isdigit() and int(offered) != size:
            raise DatasetError(f"{url}: expected {size} bytes, found {offered}")
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(desc=part.stem, total=size, initial=have, unit="B", unit_scale=True, disable=None) as bar,
        ):
            # The size is checked here too, because a response without Content-Length may never end.
            while file.tell() <= size and (chunk := response.read(CHUNK)):
                file.write(chunk)
                bar.update(len(chunk))


def download(url: str, part: Path, size: int) -> None:
    """Download `part` up to `size` bytes, resuming a partial file and retrying after a broken connection.

    Raises DatasetError if the server refuses, or if the connection still fails after TRIES requests.
    """
    if bytes_in(part) > size:
        part.unlink()
    tries, reason = 0, ""
    while bytes_in(part) < size:
        if tries == TRIES:
            raise DatasetError(f"{url}: {reason}; run the same command again to continue")
        if tries > 0:
            print(f"{url}: {reason}, trying again", flush=True)
            time.sleep(PAUSE)
        tries += 1
        try:
            fetch(url, part, size)
            reason = "connection closed early"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416 and part.exists():
                part.unlink()
            elif error.code < 500:
                raise DatasetError(f"{url}: {reason}") from error
        except (ValueError, http.client.InvalidURL) as error:
            raise DatasetError(f"{url}: not a valid URL ({error})") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error))


def verify(path: Path, size: int, sha256: str) -> None:
    """Delete `path` and raise DatasetError unless it has this size in bytes and this SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    expected, found = f"{size} bytes", f"{bytes_in(path)} bytes"
    if expected == found:
        expected, found = f"sha256 {sha256}", f"sha256 {digest.hexdigest()}"
    if expected != found:
        path.unlink()
        raise DatasetError(f"{path}: expected {expected}, found {found}; deleted, run the same command again")


def unpack(path: Path, folder: Path, temporary: Path) -> None:
    """Unpack a tar file into `temporary` and rename that to `folder`, which is therefore complete or absent.

    Raises DatasetError for a broken tar file or a member outside the target folder.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            tar.extractall(temporary, members=tqdm(tar, unit=" files", disable=None), filter="data")
        if folder.exists():
            folder.rmdir()  # it is empty; Windows does not rename over an existing folder
        inner = temporary / folder.name
        (inner if inner.is_dir() else temporary).rename(folder)
    except tarfile.TarError as error:
        raise DatasetError(f"{path}: cannot be unpacked, {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def install(archive: Archive, data_dir: Path, base_url: str) -> None:
    """Download and unpack an archive into `data_dir` unless its folder exists; remove leftovers of interrupted runs."""
    folder, temporary = data_dir / archive.folder, data_dir / f"{archive.folder}.part"
    path, part = data_dir / archive.name, data_dir / f"{archive.name}.part"
    if temporary.exists():
        shutil.rmtree(temporary)
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder}: already there")
    else:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            print(f"{path}: downloading, {bytes_in(part):,} of {archive.size:,} bytes done", flush=True)
            download(f"{base_url.rstrip('/')}/{archive.name}", part, archive.size)
            part.rename(path)
        print(f"{path}: verifying", flush=True)
        verify(path, archive.size, archive.sha256)
        print(f"{path}: unpacking", flush=True)
        unpack(path, folder, temporary)
        path.unlink()
    part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 1 after an error or 130 after Ctrl-C, each reported in one line on stderr."""
    args = parse_args(argv)
    try:
        if not hasattr(tarfile, "data_filter"):
            raise DatasetError("this Python cannot unpack safely; use 3.10.12, 3.11.4, 3.12 or newer")
        for archive in ARCHIVES:
            install(archive, args.data_dir, args.base_url)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Stanford Dogs is complete in {args.data_dir}")
    print(f"next: python pretrain.py --data_dir {shlex.quote(str(args.data_dir))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
