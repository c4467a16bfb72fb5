"""What the commands say and how they end: Ctrl-C, folders that cannot be written or read, frames that are too small."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.cli import run
from common.errors import UserError, os_error_line
from common.files import check_writable
from inference.processes import run_command
from loaders.sequence import open_sequence
from loaders.video import read_video
from preprocessing.cli import main
from tests.launch import launch

ROOT = Path(__file__).resolve().parents[1]


def images(folder: Path, size: tuple[int, int], count: int = 3) -> Path:
    """A folder of noise images."""
    folder.mkdir(parents=True)
    for t in range(count):
        noise = np.random.default_rng(t).integers(0, 255, (*size, 3), np.uint8)
        cv2.imwrite(str(folder / f"{t}.png"), noise)
    return folder


def become_nobody() -> None:
    """Drop the rights of root."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def test_ctrl_c_in_a_command_is_one_line_and_exit_code_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(interrupted)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 130 and len(lines) == 1 and "stopped by Ctrl-C" in lines[0]


@pytest.mark.parametrize("code, error, message", [
    ("import os; os.kill(os.getpid(), 9)", UserError, "stage.py was killed .*memory was short"),
    ("import os; os.abort()", RuntimeError, "stage.py ended with signal SIGABRT"),
    ("import sys; print('error: no clip', file=sys.stderr); sys.exit(2)", UserError, "^no clip$")])
def test_how_a_stage_of_a_command_failed(code, error, message, tmp_path):
    (tmp_path / "stage.py").write_text(code)
    with pytest.raises(error, match=message):
        run_command([str(tmp_path / "stage.py")], show=lambda text: None)


@pytest.mark.parametrize("command", [["eval.py"], ["viz.py"], ["train.py"], ["-m", "preprocessing"]])
@pytest.mark.parametrize("library", ["numpy", "libtorch"])
def test_ctrl_c_while_modules_are_imported_is_one_line(command, library, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *command, "--data_dir", str(tmp_path / "none")], cwd=ROOT,
                               env=environment, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    lines = process.communicate()[1].splitlines()
    assert process.returncode in (130, 2) and len(lines) <= 1, lines


def test_a_folder_that_cannot_be_written_is_named_with_its_option(tmp_path):
    check_writable(tmp_path / "new", "--out_dir")
    assert not any((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/results cannot be written, .* with --out_dir"):
        check_writable(tmp_path / "file" / "results", "--out_dir")
    if os.geteuid() == 0 and Path("/proc/self").is_dir():
        with pytest.raises(UserError, match="/proc/results cannot be written"):
            check_writable("/proc/results", "--out")


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (15, 40)])
def test_frames_of_few_pixels_a_side_are_refused(size, tmp_path):
    folder = images(tmp_path / "images", size)
    with pytest.raises(UserError, match=f"{size[1]}x{size[0]} pixels: each side must have at least 16"):
        main(["--video", str(folder), "--data_dir", str(tmp_path / "seq")])
    assert not (tmp_path / "seq").exists() or not any((tmp_path / "seq").iterdir())
    images(tmp_path / "made" / "color", size)
    with pytest.raises(UserError, match="at least"):
        main(["--data_dir", str(tmp_path / "made")])
    with pytest.raises(UserError, match="at least 16"):
        main(["flow", str(folder / "0.png"), str(folder / "1.png"), "--out", str(tmp_path / "flow.npy")])
    if min(size) == 1:  # coordinates would be divided by zero
        with pytest.raises(UserError, match="at least 2 pixels"):
            open_sequence(tmp_path / "made")


def test_small_frames_can_be_enlarged(tmp_path):
    folder = images(tmp_path / "images", (12, 40))
    main(["--video", str(folder), "--data_dir", str(tmp_path / "seq"), "--short_side", "16"])
    assert open_sequence(tmp_path / "seq").size == (16, 53)


def test_a_folder_without_images_names_what_it_has(tmp_path):
    for name in ("plate.1001.dpx", "plate.1000.dpx", ".hidden.png"):
        (tmp_path / name).write_bytes(b"SDPX")
    with pytest.raises(UserError, match=r"no images .*\.png.* plate.1000.dpx") as error:
        list(read_video(tmp_path))
    assert "--start" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        list(read_video(tmp_path / "empty"))
    folder = images(tmp_path / "three", (24, 32))
    with pytest.raises(UserError, match="3 frames, none in the range 5 to the end: change --start"):
        list(read_video(folder, 5))
    (tmp_path / "seq" / "color").mkdir(parents=True)
    (tmp_path / "seq" / "color" / "a.dpx").touch()
    with pytest.raises(UserError, match=r"no images .* a.dpx"):
        open_sequence(tmp_path / "seq")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a command as somebody else")
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path):
    folder = images(tmp_path / "images", (24, 32))
    folder.chmod(0o700)
    for parent in folder.parents:
        if parent == Path("/tmp"):
            break
        parent.chmod(0o755)
    tmp_path.chmod(0o777)
    result = launch("preprocessing", "--video", folder, "--data_dir", tmp_path / "seq", prepare=become_nobody)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, lines
    assert str(folder) in lines[0] and "permission is denied" in lines[0]


def test_a_file_that_cannot_be_written_is_named_and_not_its_temporary_file():
    error = PermissionError(13, "Permission denied", "/out/.tmp-12-tracks.csv")
    assert os_error_line(error).startswith("/out/tracks.csv: permission is denied")
    assert os_error_line(PermissionError(13, "Permission denied"), "/out") == os_error_line(
        PermissionError(13, "Permission denied", "/out"))
    assert os_error_line(PermissionError(13, "Permission denied")).startswith("permission is denied")
