"""The interactive page in a real browser: a click shows the model's track."""

import csv
import io
import json
import re
import shutil
import time
import zlib

import numpy as np
import pytest

from configs.options import parse
from drawing.pack import GridTracks, coarsest_quantum, pack
from drawing.page import PageData, page_html
from drawing.page_data import collect_page_data
from drawing.run_views import Views
from eval import evaluate
from loaders.predicted_tracks import load_tracks
from loaders.source_frames import SourceFrames
from training.trainer import Trainer
from viz import visualize

NAME = 'x<img src=q onerror=alert(1)>&"'  # of the sequence folder
QUICK = ("--num_pairs 2 --num_pts 32 --num_samples_ray 8 --coupling_width 32 --affine_width 16 --affine_layers 3 "
         "--field_width 24 --num_iters 10").split()


def grid_tracks(rng, shape=(4, 5), T=6, step=1.0, frame=0):
    """Random walks."""
    n = shape[0] * shape[1]
    return GridTracks(frame, shape, np.cumsum(rng.normal(0, step, (n, T, 2)), 1).astype(np.float32),
                      rng.random((n, T)) > 0.4, rng.random((n, T)).astype(np.float32),
                      rng.random((n, T)).astype(np.float32))


def unpacked(data, shape, T, quantum):
    """Unpack tracks as pack.py describes: x, y `(n, T)`, visible, depth and score in [0, 1]."""
    n = shape[0] * shape[1]
    total, data = n * T, np.frombuffer(zlib.decompress(data), np.uint8).astype(int)
    out = []
    for k in (0, 1):
        z = data[2 * k * total:(2 * k + 1) * total] + 256 * data[(2 * k + 1) * total:(2 * k + 2) * total]
        change = np.where(z % 2, -(z + 1) // 2, z // 2).reshape(T, *shape)
        whole = np.cumsum(np.cumsum(change, 2), 0)
        out.append(((whole + 2**15) % 2**16 - 2**15).reshape(T, n).T * quantum)
    bits = -(-total // 8)
    seen = [(data[4 * total + k // 8] >> (k % 8)) & 1 for k in range(total)]
    rest = data[4 * total + bits:].reshape(2, T, n)
    return *out, np.array(seen).reshape(T, n).T, *(np.cumsum(rest, 1) % 256 / 255).transpose(0, 2, 1)


@pytest.mark.parametrize("step", [0.5, 300.0])
def test_packed_tracks_are_the_same_within_half_a_quantum(step):
    block = grid_tracks(np.random.default_rng(0), step=step)
    x, y, visible, depth, score = unpacked(pack(block, 0.125, (0.0, 1.0)), block.shape, 6, 0.125)
    assert abs(np.stack([x, y], -1) - block.tracks).max() <= 0.0626
    assert np.array_equal(visible, block.visible)
    assert max(abs(depth - block.depth).max(), abs(score - block.score).max()) <= 0.5 / 255 + 1e-6


def test_positions_in_large_frames_fit_into_16_bits():
    assert coarsest_quantum((480, 854), 0.125) == 0.125
    assert 2 * 7680 / coarsest_quantum((4320, 7680), 0.125) <= 32_767


def page_data(T=3, shape=(24, 32)):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (T, 96, 128, 3), np.uint8)
    return PageData("x", 10, frames, list(range(T)), [grid_tracks(rng, shape, T, 5.0)], 4, 0.99,
                    rng.random((T, 8, 8)), rng.normal(size=(T - 1, 8, 8, 2)), None)


def test_a_page_keeps_to_its_size_and_says_what_was_left_out():
    free, tight = page_data(), page_data()
    assert len(page_html(free, 25)) < 25e6 and not free.notices
    page = page_html(tight, 0.09)
    assert len(page) <= 0.09e6 and tight.interval > 4
    assert tight.notices == [f"to keep the file small, tracks are {tight.interval} pixels apart"]
    assert tight.notices[0] in page


@pytest.fixture(scope="module")
def run(small_sequence, tmp_path_factory):
    """Arguments that name a run of ten steps, whose sequence has a name full of markup, and its page."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(small_sequence, folder / NAME)
    arguments = ["--data_dir", str(folder / NAME), "--save_dir", str(folder / "out")]
    trainer = Trainer(parse("train", [*arguments, *QUICK]))
    trainer.dir.mkdir(parents=True)
    for _ in range(10):
        trainer.train_step()
    trainer.save()
    visualize(parse("viz", [*arguments, "--what", "page", "--page_interval", "4", "--page_query_stride", "3",
                            "--dense_interval", "4", "--out_dir", str(folder)]))
    return arguments, folder / "page.html"


def test_a_long_video_is_thinned_and_the_page_says_so(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("drawing.page_data.MAX_FRAMES", 4)
    visualize(parse("viz", [*run[0], "--what", "page", "--page_interval", "8", "--dense_interval", "8",
                            "--out_dir", str(tmp_path)]))
    text = (tmp_path / "page.html").read_text()
    meta = json.loads(re.search(r'id="meta">(.*?)</script>', text).group(1))
    assert meta["frames"] == [0, 2, 4, 6] and meta["fps"] == 5
    assert meta["notices"] == ["1 of 2 frames is shown; the video has 8 frames"] and meta["notices"][0] in caplog.text
    assert len(re.findall(r'id="(?:video|flow|depth)-\d+"', text)) == 12


def test_grids_of_several_frames_are_tracked_together_as_each_alone(run, monkeypatch):
    views = Views(parse("viz", [*run[0], "--page_interval", "6", "--page_query_stride", "3", "--dense_interval", "8"]))
    together = collect_page_data(views)
    monkeypatch.setattr("drawing.page_data.SAMPLES_AT_A_TIME", 1)
    alone = collect_page_data(views)
    assert len(together.blocks) > 1
    for one, other in zip(together.blocks, alone.blocks, strict=True):
        assert one.query_frame == other.query_frame and one.shape == other.shape
        assert np.allclose(one.tracks, other.tracks, atol=1e-3) and np.array_equal(one.visible, other.visible)
        assert np.allclose(one.depth, other.depth, atol=1e-4) and np.allclose(one.score, other.score, atol=1e-5)


def test_the_background_is_known_where_only_the_foreground_is_drawn(run):
    views = [Views(parse("viz", [*run[0], *more])) for more in ([], ["--use_mask", "--grid_interval", "5"])]
    drawn = views[1].foreground
    assert drawn.all() and 8 < len(drawn) < 13 * 13  # of the grid, what lies inside the mask
    assert np.allclose(views[0].background_steps, views[1].background_steps, atol=1e-3)
    assert abs(views[1].background_steps - np.eye(3)).max() > 0.01


def test_without_a_mask_dense_points_have_the_labels_of_the_coarse_ones_around_them(run, tmp_path):
    shutil.copytree(run[0][1], tmp_path / NAME, ignore=shutil.ignore_patterns("mask"))
    arguments = ["--data_dir", str(tmp_path / NAME), *run[0][2:]]
    coarse, dense = (Views(parse("viz", [*arguments, *more])) for more in ([], ["--grid_interval", "1"]))
    assert coarse.mask is None and len(dense.points) == 64 * 64
    moving = coarse.scene[1]
    moving[:] = dense.scene[1][:] = coarse.points[:, 0] > 30
    assert np.array_equal(coarse.foreground, moving)
    far = abs(dense.points[:, 0] - 30) > 1  # from the border between the labels
    assert np.array_equal(dense.foreground[far], dense.points[far, 0] > 30)


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, run):
    """Opens the page from its file; fails the test if the browser complains about anything."""
    complaints, contexts = [], []

    def open_it(file=run[1], **device):
        contexts.append(browser.new_context(**device))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda r: complaints.append(r.url) if r.url.startswith("http") else None)
        page.goto(file.as_uri())
        until(page, "images.ready('video-0') && blocks.ready(0)")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not complaints


def until(page, condition):
    """Waits until a JavaScript condition holds. The page's policy forbids what playwright's own waiting needs."""
    deadline = time.monotonic() + 20
    while not page.evaluate(f"!!({condition})"):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def screen(page, x, y):
    """Where pixel (x, y) of the video is in the window."""
    return page.evaluate("([x, y]) => { const r = stage.canvas.getBoundingClientRect(), p = stage.toScreen(x, y);"
                         "return [r.left + p[0], r.top + p[1]]; }", [x, y])


def selected(page):
    until(page, "state.selection.length > 0")
    return list(csv.DictReader(io.StringIO(page.evaluate("csv()"))))


def test_a_click_shows_the_track_that_eval_writes(open_page, run, tmp_path):
    page = open_page(viewport={"width": 1200, "height": 800})
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, "state.frame === 3 && blocks.ready(1)")
    page.mouse.click(*screen(page, 30.2, 21.7))  # nearest to the query point (29, 21) of the grid 1, 5, 9, ...
    rows = selected(page)

    (tmp_path / "q.csv").write_text("t,y,x\n3,21,29\n")
    evaluate(parse("eval", [*run[0], "--queries", str(tmp_path / "q.csv"), "--out", str(tmp_path / "tracks.npz")]))
    truth = load_tracks(tmp_path / "tracks.npz")
    assert len(rows) == 8
    shown = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    assert abs(shown - truth.tracks[0]).max() <= 0.0626  # half of 1/8 pixel
    assert [row["visible"] == "1" for row in rows] == truth.visible[0].tolist()
    assert abs(np.array([float(row["occlusion_score"]) for row in rows]) - truth.occlusion_score[0]).max() < 0.003
    page.wait_for_timeout(100)  # the mark has the track's color, where the track is; it has a cross in its query frame
    x, y = page.evaluate("stage.toScreen(state.selection[0].x[3], state.selection[0].y[3])")
    pixel = page.evaluate("([x, y]) => [...stage.context.getImageData(x - 3, y + 2, 1, 1).data]", [x, y])
    assert pixel == [255, 176, 0, 255]


def test_a_box_selects_tracks_and_escape_clears_them(open_page):
    page = open_page(viewport={"width": 1200, "height": 800})
    (left, top), (right, bottom) = screen(page, 10, 10), screen(page, 30, 24)
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move((left + right) / 2, bottom)
    page.mouse.move(right, bottom)
    page.mouse.up()
    rows = [row for row in selected(page) if row["frame"] == "0"]
    assert len(rows) == 5 * 3  # 13, 17, ..., 29 by 13, 17, 21
    assert all(9.9 < float(row["x"]) < 30.1 and 9.9 < float(row["y"]) < 24.1 for row in rows)
    assert "15 tracks in the box" in page.inner_text("#what")
    page.mouse.click(*screen(page, 30, 24), button="right")  # only opens the browser's menu
    page.wait_for_timeout(200)
    assert page.evaluate("state.selection.length") == 15
    page.keyboard.press("Escape")
    assert page.evaluate("state.selection.length") == 0 and "Nothing selected" in page.inner_text("#empty")
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move(left + 6, top + 2)  # between the grid's points
    page.mouse.up()
    until(page, "document.getElementById('empty').innerText.startsWith('No visible track in the box')")


def test_play_speed_layers_and_the_name(open_page):
    page = open_page(viewport={"width": 1200, "height": 800})
    assert page.inner_text("h1") == NAME and page.locator("h1 img").count() == 0
    page.keyboard.press("]")
    page.keyboard.press(" ")
    until(page, "state.frame > 2")
    page.keyboard.press(" ")
    assert not page.evaluate("state.playing") and page.evaluate("state.speed") == 2
    for key, words in (("2", "near"), ("3", "px a frame"), ("1", "")):
        page.keyboard.press(key)
        assert words in (page.inner_text("#legend") if words else "")
    assert page.is_hidden("#legend")
    page.keyboard.press("End")
    until(page, "document.getElementById('counter').innerText.trim() === 'Frame 7 / 7'")


def test_a_tap_on_a_phone(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, device_scale_factor=3, has_touch=True, is_mobile=True)
    page.touchscreen.tap(*screen(page, 33, 33))
    assert len(selected(page)) == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#play", "#back", "#forward", "#speed", "#trail"):
        box = page.locator(name).bounding_box()
        assert box["height"] >= 40 and box["x"] >= 0 and box["x"] + box["width"] <= 390


@pytest.mark.parametrize("width", [320, 500])
def test_nothing_overlaps_in_a_narrow_window(open_page, width):
    page = open_page(viewport={"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == width

    def apart(*names):
        shown = [page.locator(name).bounding_box() for name in names if page.is_visible(name)]
        return all(a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"] or a["y"] + a["height"] <= b["y"] or
                   b["y"] + b["height"] <= a["y"] for k, a in enumerate(shown) for b in shown[:k])

    over_the_video = ("#hint", "#cursor", "#legend", "#zoomed")
    page.mouse.move(*screen(page, 20, 20))
    page.keyboard.press("2")
    until(page, "!document.getElementById('cursor').hidden")
    assert page.is_visible("#hint") and page.is_visible("#legend") and apart(*over_the_video)
    page.keyboard.press("+")
    until(page, "!document.getElementById('zoomed').hidden")
    assert apart(*over_the_video)
    assert apart("#play", "#back", "#forward", "#counter", "#speed", "#trail") and page.is_visible("#trail")


def test_keys_work_after_a_control_was_clicked_and_not_against_a_control_that_tab_reached(open_page):
    page = open_page(viewport={"width": 1200, "height": 800})

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)
        return page.evaluate("[state.frame, state.layer, state.trail, state.mix, state.playing]")

    page.click("#trail")  # opens the list
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    until(page, "state.trail === 'whole'")
    assert press("ArrowRight") == [1, "video", "whole", 1, False]
    page.click("#layers [data-layer=depth]")
    page.click("#mix")  # in the middle
    assert press("ArrowRight", "3") == [2, "flow", "whole", 0.55, False]
    page.click("#forward")
    page.keyboard.press(" ")
    assert page.evaluate("state.playing")
    page.keyboard.press(" ")

    page.keyboard.press("Home")
    page.locator("#layers [data-layer=flow]").focus()
    assert press("ArrowLeft") == [0, "depth", "whole", 0.55, False]
    page.keyboard.press("Tab")
    assert press("ArrowRight", "]", "1")[:4] == [0, "video", "whole", 0.56]
    page.locator("#trail").focus()
    assert press("ArrowDown")[:3] == [0, "video", "near"]
    assert press("ArrowDown")[:3] == [0, "video", "none"]


def test_copy_keeps_focus_and_scroll(open_page):
    page = open_page(viewport={"width": 390, "height": 600})
    page.mouse.click(*screen(page, 33, 33))
    selected(page)
    page.locator("#copy").focus()
    page.evaluate("scrollTo(0, 200)")
    page.keyboard.press("c")
    assert page.inner_text("#copy") == "Copied"
    assert page.evaluate("[document.activeElement.id, scrollY]") == ["copy", 200]


def test_a_speed_above_that_of_the_screen_skips_frames(open_page):
    page = open_page(viewport={"width": 1200, "height": 800})
    page.evaluate("meta.fps = 240")
    page.keyboard.press(" ")
    until(page, "[0, 1, 2, 3, 4, 5, 6, 7].every((t) => images.ready(`video-${t}`))")
    shown, frames = page.evaluate("""new Promise((done) => {
        let shown = 0, frames = 0, last = state.frame;
        const count = () => {
          shown++;
          frames += (state.frame - last + meta.count) % meta.count;
          last = state.frame;
          if (shown < 30) requestAnimationFrame(count); else done([shown, frames]);
        };
        count();
      })""")
    assert frames > 2 * shown


def test_the_position_in_a_larger_source_is_shown(open_page, tmp_path):
    data = page_data()
    data.source = SourceFrames((96, 128), (288, 384), np.array([4, 6, 8]))
    (tmp_path / "page.html").write_text(page_html(data))
    page = open_page(tmp_path / "page.html", viewport={"width": 1200, "height": 800})
    page.keyboard.press("ArrowRight")
    page.mouse.click(*screen(page, 64, 48))
    rows = selected(page)
    until(page, "document.getElementById('now').innerText.includes('Source frame 6')")
    shown = page.inner_text("#now").split("Source frame 6")[1].split("Depth")[0]
    assert [float(v) for v in shown.split(",")] == pytest.approx([float(rows[1]["x"]), float(rows[1]["y"])], abs=0.051)
    assert "384×288" in page.inner_text("#notes")
