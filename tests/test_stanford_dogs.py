"""The downloader against a small local server with simulated failures; no test uses the network."""

import hashlib
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import stanford_dogs

REPO = Path(__file__).resolve().parent.parent
ALWAYS = 10**9
BREEDS = {"n02085620-Chihuahua/n02085620_1.jpg": 20_000, "n02116738-African_hunting_dog/n02116738_7.jpg": 9_000}
LISTS = {"train_list.mat": 700, "test_list.mat": 300, "file_list.mat": 900}


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """An uncompressed tar file with symbolic `links` (name to target) before its plain `members`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


IMAGES_TAR = tar({f"Images/{name}": content(name, size) for name, size in BREEDS.items()})
LISTS_TAR = tar({name: content(name, size) for name, size in LISTS.items()})
ANNOTATIONS = {name.removesuffix(".jpg"): 500 for name in BREEDS}
ANNOTATION_TAR = tar({f"Annotation/{name}": content(name, size) for name, size in ANNOTATIONS.items()})
CONTENTS = {"Images": BREEDS, "lists": LISTS, "Annotation": ANNOTATIONS}
COMPLETE = {f"{folder}/{name}" for folder, files in CONTENTS.items() for name in files}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site, name, requested = self.server, self.path.removeprefix("/dogs/"), self.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", requested).group(1)) if requested and site.ranges else 0
        body = site.files.get(name)
        if body is None:
            status = 404
        elif requested and (site.refuse_ranges or start >= len(body)):
            status = 416
        elif site.busy > 0:
            site.busy -= 1
            status = 503
        else:
            status = 206 if requested and site.ranges else 200
        rest = body[start:] if status in (200, 206) else b""
        sent = rest
        if site.breaks > 0 and rest:
            site.breaks -= 1
            sent = rest[: len(rest) // 2]
        site.requests.append((name, requested, status, len(sent)))
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if site.send_length:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(sent)  # HTTP/1.0: the connection is then closed, even if Content-Length announced more

    def log_message(self, *_) -> None:
        pass


class Site(ThreadingHTTPServer):
    """Serves `files`, records (name, Range, status, bytes sent) of every request, and fails as its fields say."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"images.tar": IMAGES_TAR, "lists.tar": LISTS_TAR, "annotation.tar": ANNOTATION_TAR}
        self.requests: list[tuple[str, str | None, int, int]] = []
        self.ranges, self.refuse_ranges, self.send_length = True, False, True
        self.breaks = self.busy = 0  # how many of the next responses break off halfway, or have status 503
        self.url = f"http://127.0.0.1:{self.server_port}/dogs/"

    def of(self, name: str) -> list[tuple[str | None, int, int]]:
        """(Range, status, bytes sent) of the requests for one archive."""
        return [request[1:] for request in self.requests if request[0] == name]


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(site, tmp_path, monkeypatch, capsys):
    """Runs the script with data_dir tmp_path/dogs and returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(stanford_dogs, "PAUSE", 0.0)
    monkeypatch.setattr(stanford_dogs, "CHUNK", 4096)
    expect(monkeypatch, site.files)

    def call(base_url: str = site.url):
        code = stanford_dogs.main(["--data_dir", str(tmp_path / "dogs"), "--base_url", base_url])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def dogs(tmp_path) -> Path:
    return tmp_path / "dogs"


def expect(monkeypatch, files: dict[str, bytes]) -> None:
    """Make the script expect these archives instead of the official ones."""
    archives = [
        archive._replace(size=len(files[archive.name]), sha256=hashlib.sha256(files[archive.name]).hexdigest())
        for archive in stanford_dogs.ARCHIVES
    ]
    monkeypatch.setattr(stanford_dogs, "ARCHIVES", archives)


def tree(folder: Path) -> set[str]:
    """Every file and every empty folder below `folder`."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir())]
    return {path.relative_to(folder).as_posix() for path in paths}


def assert_complete(folder: Path) -> None:
    assert tree(folder) == COMPLETE
    for part, files in CONTENTS.items():
        for name, size in files.items():
            assert (folder / part / name).read_bytes() == content(name, size)


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    for part in parts:
        assert part in stderr


def test_import_has_no_side_effects(tmp_path):
    code = """if True:
        import sys
        def forbid(event, args):
            writes = event == "open" and args[1] not in ("r", "rb", None)
            if writes or event in ("os.mkdir", "os.remove", "socket.getaddrinfo", "socket.connect"):
                sys.exit(f"{event} {args}")
        sys.addaudithook(forbid)
        from data import stanford_dogs
    """
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, "--no_such_flag"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert tree(tmp_path) == set()


def test_defaults():
    args = stanford_dogs.parse_args([])
    assert args.data_dir == Path("data/Original")
    assert args.base_url == "http://vision.stanford.edu/aditya86/ImageNetDogs/"


def test_downloads_and_unpacks_the_archives_and_deletes_them(run, site, dogs):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "complete" in out
    assert_complete(dogs)
    assert sorted(site.requests) == [
        ("annotation.tar", None, 200, len(ANNOTATION_TAR)),
        ("images.tar", None, 200, len(IMAGES_TAR)),
        ("lists.tar", None, 200, len(LISTS_TAR)),
    ]


def test_base_url_without_slash(run, site, dogs):
    assert run(site.url.rstrip("/"))[0] == 0
    assert_complete(dogs)


def test_second_run_sends_no_request(run, site, dogs):
    run()
    site.requests.clear()
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "already there" in out
    assert site.requests == []
    assert_complete(dogs)


@pytest.mark.parametrize(
    "folder, archive", [("Images", "images.tar"), ("lists", "lists.tar"), ("Annotation", "annotation.tar")]
)
@pytest.mark.parametrize("empty", [False, True])
def test_downloads_only_the_missing_folder(run, site, dogs, folder, archive, empty):
    run()
    site.requests.clear()
    (dogs / folder).rename(dogs.parent / "elsewhere")
    if empty:
        (dogs / folder).mkdir()
    assert run()[0] == 0
    assert [request[0] for request in site.requests] == [archive]
    assert_complete(dogs)


def test_broken_connection_is_resumed(run, site, dogs):
    for part in ("lists", "Annotation"):  # are there already
        for name, size in CONTENTS[part].items():
            (dogs / part / name).parent.mkdir(parents=True, exist_ok=True)
            (dogs / part / name).write_bytes(content(name, size))
    site.breaks = 1
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "trying again" in out
    half = len(IMAGES_TAR) // 2
    assert site.requests == [
        ("images.tar", None, 200, half),
        ("images.tar", f"bytes={half}-", 206, len(IMAGES_TAR) - half),
    ]
    assert_complete(dogs)


def test_server_without_ranges_starts_over(run, site, dogs):
    site.ranges, site.breaks = False, 1
    assert run()[0] == 0
    half = len(LISTS_TAR) // 2
    assert site.of("lists.tar") == [(None, 200, half), (f"bytes={half}-", 200, len(LISTS_TAR))]
    assert_complete(dogs)


def test_stops_after_several_tries_and_the_next_run_continues(run, site, dogs):
    site.breaks = ALWAYS
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "lists.tar", "run the same command again to continue")
    assert len(site.requests) == stanford_dogs.TRIES
    assert tree(dogs) == {"lists.tar.part"}
    site.breaks = 0
    assert run()[0] == 0
    assert sum(sent for _, _, sent in site.of("lists.tar")) == len(LISTS_TAR)
    assert_complete(dogs)


def test_server_error_is_retried(run, site, dogs):
    site.busy = 2
    assert run()[0] == 0
    assert [status for _, status, _ in site.of("lists.tar")] == [503, 503, 200]
    assert_complete(dogs)


def test_unresponsive_server_times_out(run, dogs, monkeypatch):
    monkeypatch.setattr(stanford_dogs, "TIMEOUT", 0.05)
    with Site() as silent:  # accepts connections, but never responds
        code, _, err = run(silent.url)
    assert code == 1
    assert_one_line(err, "timed out", "run the same command again")


def test_ctrl_c_during_a_download_keeps_the_partial_file(run, site, dogs, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stanford_dogs.tqdm, "update", interrupt)
        code, _, err = run()
    assert code == 130
    assert_one_line(err, "interrupted")
    assert tree(dogs) == {"lists.tar.part"}
    assert run()[0] == 0
    assert site.of("lists.tar")[1] == ("bytes=4096-", 206, len(LISTS_TAR) - 4096)
    assert_complete(dogs)


def test_refused_range_starts_over(run, site, dogs):
    dogs.mkdir()
    (dogs / "lists.tar.part").write_bytes(LISTS_TAR[:1000])
    site.refuse_ranges = True
    assert run()[0] == 0
    assert site.of("lists.tar") == [("bytes=1000-", 416, 0), (None, 200, len(LISTS_TAR))]
    assert_complete(dogs)


def test_too_large_partial_file_starts_over(run, site, dogs):
    dogs.mkdir()
    (dogs / "lists.tar.part").write_bytes(LISTS_TAR + b"x")
    assert run()[0] == 0
    assert site.of("lists.tar") == [(None, 200, len(LISTS_TAR))]
    assert_complete(dogs)


@pytest.mark.parametrize("name", ["lists.tar", "lists.tar.part"])
def test_complete_archive_is_not_downloaded_again(run, site, dogs, name):
    dogs.mkdir()
    (dogs / name).write_bytes(LISTS_TAR)
    assert run()[0] == 0
    assert site.of("lists.tar") == []
    assert_complete(dogs)


def test_corrupted_archive_is_deleted_before_unpacking(run, site, dogs):
    good = site.files["lists.tar"]
    bad = good[:600] + b"\0" + good[601:]  # inside the first file: tarfile alone would not notice
    assert bad != good
    site.files["lists.tar"] = bad
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "lists.tar", hashlib.sha256(good).hexdigest(), hashlib.sha256(bad).hexdigest())
    assert tree(dogs) == set()
    site.files["lists.tar"] = good
    assert run()[0] == 0
    assert_complete(dogs)


def test_corrupted_partial_file_is_deleted(run, site, dogs):
    dogs.mkdir()
    (dogs / "lists.tar.part").write_bytes(b"<html>" * 100)
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "lists.tar", "sha256")
    assert tree(dogs) == set()
    assert run()[0] == 0
    assert_complete(dogs)


@pytest.mark.parametrize("body", [LISTS_TAR[:-512], LISTS_TAR + bytes(512)], ids=["short", "long"])
def test_wrong_content_length_keeps_the_partial_file(run, site, dogs, body):
    dogs.mkdir()
    (dogs / "lists.tar.part").write_bytes(LISTS_TAR[:1000])
    site.files["lists.tar"] = body
    for ranges in (True, False):
        site.ranges = ranges
        code, _, err = run()
        assert code == 1
        assert_one_line(err, "lists.tar", str(len(LISTS_TAR)), str(len(body)))
    assert (dogs / "lists.tar.part").read_bytes() == LISTS_TAR[:1000]
    assert tree(dogs) == {"lists.tar.part"}
    site.files["lists.tar"], site.ranges = LISTS_TAR, True
    assert run()[0] == 0
    assert_complete(dogs)


def test_oversized_response_is_cut_off_and_deleted(run, site, dogs):
    site.send_length = False
    site.files["lists.tar"] = LISTS_TAR + bytes(10**6)
    code, _, err = run()
    assert code == 1
    found = int(re.search(r"found (\d+) bytes", err).group(1))
    assert_one_line(err, "lists.tar", f"expected {len(LISTS_TAR)} bytes")
    assert len(LISTS_TAR) < found <= len(LISTS_TAR) + stanford_dogs.CHUNK
    assert tree(dogs) == set()
    site.files["lists.tar"] = LISTS_TAR
    assert run()[0] == 0
    assert_complete(dogs)


def test_archive_missing_on_the_server(run, site, dogs):
    site.files.pop("images.tar")
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "images.tar", "404")
    assert len(site.of("images.tar")) == 1
    assert tree(dogs) == {name for name in COMPLETE if not name.startswith("Images/")}


def test_no_network(run, dogs):
    with Site() as closed:
        pass
    code, _, err = run(closed.url)
    assert code == 1
    assert_one_line(err, "refused", "run the same command again")
    assert tree(dogs) == set()


@pytest.mark.parametrize("url", ["no address", "http://127.0.0.1:port/", "http://127.0.0.1/d\u00f6gs"])
def test_invalid_url(run, url):
    code, _, err = run(url)
    assert code == 1
    assert_one_line(err, "not a valid URL")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(run, dogs):
    dogs.mkdir()
    (dogs / "lists.tar.part").symlink_to("/dev/full")
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "No space left")


@pytest.mark.parametrize(
    "evil",
    [
        tar({"good.mat": b"good", "../evil": b"evil"}),
        tar({"good.mat": b"good", "../../evil": b"evil"}),
        tar({"away/evil": b"evil"}, links={"away": "../.."}),
    ],
    ids=["beside", "above", "link"],
)
def test_members_outside_the_folder_are_rejected(run, site, dogs, monkeypatch, evil):
    site.files["lists.tar"] = evil
    expect(monkeypatch, site.files)
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "lists.tar", "cannot be unpacked")
    assert tree(dogs.parent) == {"dogs/lists.tar"}


def test_not_a_tar_file(run, site, dogs, monkeypatch):
    site.files["lists.tar"] = content("noise", 5000)
    expect(monkeypatch, site.files)
    code, _, err = run()
    assert code == 1
    assert_one_line(err, "lists.tar", "cannot be unpacked")
    assert tree(dogs) == {"lists.tar"}


def test_ctrl_c_during_unpacking_leaves_no_partial_folder(run, site, dogs, monkeypatch):
    makefile = tarfile.TarFile.makefile

    def second_one_is_interrupted(self, info, path):
        if info.name == list(LISTS)[1]:
            raise KeyboardInterrupt
        makefile(self, info, path)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", second_one_is_interrupted)
        code, _, err = run()
    assert code == 130
    assert_one_line(err, "interrupted")
    assert tree(dogs) == {"lists.tar"}
    assert run()[0] == 0
    assert len(site.of("lists.tar")) == 1
    assert_complete(dogs)


def test_run_after_a_kill_during_unpacking_completes(run, site, dogs):
    leftover = dogs / "Images.part" / "Images" / "n02085620-Chihuahua"
    leftover.mkdir(parents=True)
    (leftover / "half.jpg").write_bytes(b"half")
    (dogs / "images.tar").write_bytes(IMAGES_TAR)
    assert run()[0] == 0
    assert site.of("images.tar") == []
    assert_complete(dogs)


def test_run_after_a_kill_after_unpacking_cleans_up(run, site, dogs):
    run()
    site.requests.clear()
    (dogs / "Images.part").mkdir()
    (dogs / "images.tar.part").write_bytes(IMAGES_TAR[:100])
    assert run()[0] == 0
    assert site.requests == []
    assert_complete(dogs)


def test_archive_is_kept_if_its_folder_exists(run, site, dogs):
    run()
    (dogs / "images.tar").write_bytes(b"not ours to delete")
    assert run()[0] == 0
    assert (dogs / "images.tar").read_bytes() == b"not ours to delete"


def test_command_line_reports_one_line_and_exit_code(site, tmp_path):
    site.files.clear()
    result = subprocess.run(
        [sys.executable, str(REPO / "data" / "stanford_dogs.py"), f"--base_url={site.url}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert_one_line(result.stderr, "lists.tar", "404")
    assert tree(tmp_path) == {"data/Original"}


def test_command_line_rejects_unknown_flags(tmp_path):
    with pytest.raises(SystemExit) as stop:
        stanford_dogs.main(["--data_dir", str(tmp_path / "dogs"), "--mirror", "x"])
    assert stop.value.code == 2
    assert tree(tmp_path) == set()
