"""Damaged video files: lost frames are counted and told, and gaps are refused unless they are allowed."""

import av
import numpy as np
import pytest

from common.errors import UserError
from loaders.sequence import open_sequence
from loaders.video import VideoFacts, read_video
from preprocessing.cli import main
from tests.launch import launch
from tests.test_scenes import pan

COUNT = 60
SIZE = (96, 128)
CODECS = {"clip.mkv": ("libx264", {"crf": "18", "g": "12"}), "clip.mp4": ("libx264", {"crf": "18", "g": "12"}),
          "clip.ts": ("libx264", {"crf": "18", "g": "12"}), "clip.avi": ("mpeg4", {"g": "12", "bf": "2"}),
          "clip.webm": ("libvpx-vp9", {"g": "12"})}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Name -> bytes of a video of 60 frames, for each name of CODECS."""
    folder = tmp_path_factory.mktemp("videos")
    frames = pan(COUNT, size=SIZE)
    for name, (codec, options) in CODECS.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
            stream.options = options
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return {name: (folder / name).read_bytes() for name in CODECS}


def zeroed(data):
    """A twentieth of the file, in its middle, is zero."""
    return data[:len(data) // 2] + bytes(len(data) // 20) + data[len(data) // 2 + len(data) // 20:]


def without_a_part(data):
    return data[:len(data) // 3] + data[len(data) // 2:]


def truncated(data):
    return data[:int(0.6 * len(data))]


@pytest.mark.parametrize("name", CODECS)
def test_a_sound_video_is_read_without_a_word(name, encoded, tmp_path, caplog):
    (tmp_path / name).write_bytes(encoded[name])
    assert sum(1 for _ in read_video(tmp_path / name)) == COUNT and not caplog.records


@pytest.mark.parametrize("damage", [zeroed, without_a_part])
@pytest.mark.parametrize("name", CODECS)
def test_gaps_are_refused_unless_they_are_allowed(name, damage, encoded, tmp_path, caplog):
    if (name, damage) == ("clip.mp4", without_a_part):
        pytest.skip("an mp4 file with another length cannot be opened")
    if (name, damage) == ("clip.webm", zeroed):
        pytest.skip("the decoder of VP9 does not notice zeros within the data of one frame")
    path = tmp_path / name
    path.write_bytes(damage(encoded[name]))
    with pytest.raises(UserError, match=r"is damaged: \d+ of \d+ frames are missing or corrupt.*--allow_gaps"):
        list(read_video(path))
    left = sum(1 for _ in read_video(path, allow_gaps=True))
    assert 0 < left < COUNT
    assert f"{left} are left" in caplog.text and "in between" in caplog.text


@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm"])
def test_a_video_that_was_cut_off_is_told(name, encoded, tmp_path, caplog):
    (tmp_path / name).write_bytes(truncated(encoded[name]))
    frames = sum(1 for _ in read_video(tmp_path / name))
    assert f"frames are missing or corrupt ({COUNT - frames} at the end); {frames} are left" in caplog.text


@pytest.mark.parametrize("start,stride", [(0, 1), (3, 2), (50, 1)])
def test_frames_after_a_gap_keep_their_numbers(start, stride, encoded, tmp_path):
    """The rate is constant, so that the times tell the numbers. --start counts the frames that are left."""
    path = tmp_path / "clip.mkv"
    path.write_bytes(zeroed(encoded["clip.mkv"]))
    facts = VideoFacts()
    frames = sum(1 for _ in read_video(path, start, None, stride, facts=facts, allow_gaps=True))
    assert len(facts.numbers) == frames > 5
    assert facts.numbers == [round(time * 25) for time in facts.times]


def test_a_cut_off_avi_file_has_frames_missing_somewhere(encoded, tmp_path):
    (tmp_path / "clip.avi").write_bytes(truncated(encoded["clip.avi"]))
    with pytest.raises(UserError, match=r"of 6\d frames are missing or corrupt; give"):
        list(read_video(tmp_path / "clip.avi"))


def test_frames_before_and_after_a_gap_can_be_taken(encoded, tmp_path):
    path = tmp_path / "clip.mkv"
    path.write_bytes(zeroed(encoded["clip.mkv"]))
    with pytest.raises(UserError) as refused:
        list(read_video(path))
    gap = int(str(refused.value).split("before frame ")[1].split(";")[0])
    assert sum(1 for _ in read_video(path, stop=gap)) == gap
    assert sum(1 for _ in read_video(path, start=gap)) > 2
    with pytest.raises(UserError, match="before frame"):
        list(read_video(path, start=gap - 1))


def test_frames_that_are_flagged_as_corrupt_are_left_out(encoded, tmp_path):
    """Some bytes are wrong. All frames are decoded, a few of them with errors."""
    data = bytearray(encoded["clip.mp4"])
    for k in range(len(data) // 5, len(data) // 2, 499):
        data[k] ^= 0x55
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        flags = [frame.is_corrupt for frame in container.decode(video=0)]
    assert len(flags) == COUNT and 0 < sum(flags) < 12
    with pytest.raises(UserError, match=f"{sum(flags)} of {COUNT} frames are missing or corrupt"):
        list(read_video(path))
    facts = VideoFacts()
    frames = np.stack(list(read_video(path, allow_gaps=True, facts=facts)))
    assert facts.numbers == np.flatnonzero(~np.array(flags)).tolist()  # those of the undamaged video
    whole = np.stack(pan(COUNT, size=SIZE))[~np.array(flags)]
    assert len(frames) == len(whole)
    assert np.median(np.abs(frames.astype(int) - whole).mean(axis=(1, 2, 3))) < 15


def test_the_command_refuses_gaps_and_says_what_is_left(encoded, tmp_path):
    path = tmp_path / "clip.mkv"
    path.write_bytes(zeroed(encoded["clip.mkv"]))
    said = launch("preprocessing", "--video", path, "--data_dir", tmp_path / "seq", "--pairs", "window:1")
    assert said.returncode == 2 and len(said.stderr.strip().splitlines()) == 1 and "--allow_gaps" in said.stderr
    assert not (tmp_path / "seq" / "color").exists()
    main(["--video", str(path), "--data_dir", str(tmp_path / "seq"), "--pairs", "window:1", "--allow_gaps"])
    assert 0 < len(open_sequence(tmp_path / "seq")) < COUNT


@pytest.mark.parametrize("option", [["--stride", "3"], ["--start", "2"], ["--max_frames", "5"], ["--allow_gaps"]])
def test_options_of_videos_need_a_video(option, small_sequence):
    with pytest.raises(UserError, match=f"{option[0]} needs --video"):
        main(["--data_dir", str(small_sequence), *option])


def test_frames_that_are_left_out_are_told(small_sequence, caplog):
    caplog.set_level("INFO")
    open_sequence(small_sequence)
    open_sequence(small_sequence, None)
    assert not caplog.records
    open_sequence(small_sequence, 5)
    assert caplog.messages == [f"{small_sequence}/color has 8 frames: the first 5 are used (--num_imgs 5)"]
