"""Playing: what the server answers and refuses, and a real browser that steers the model by its keyboard."""

import contextlib
import http.client
import io
import json
import math
import shutil
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from test_commands import finish, start
from test_train import CPU, TINY, write_digits

import sample
import train
from config import UserError, plain_settings, read_settings
from data import load_batch

WORLD = TINY | {"dataset": "world", "digits": 3, "canvas_size": 24, "speed": (4.0, 4.0), "max_steps": 2}


@pytest.fixture(scope="module", params=["discrete", "continuous", "none"])
def parts(request, tmp_path_factory):
    """(model, source, stats) of a world with five actions, of one with vectors of two, and of digits without any."""
    folder = write_digits(tmp_path_factory.mktemp("mnist") / "mnist")
    changes = WORLD if request.param != "none" else TINY
    cfg = SimpleNamespace(**plain_settings(vars(train)) | changes | {"data_dir": str(folder)})
    source = train.open_source(cfg, "val")
    if request.param == "continuous":
        clip, source.action_dim = source.clip, 2
        source.clip = lambda index: (clip(index)[0], np.float32([[a, -a] for a in clip(index)[1]]))
    torch.manual_seed(0)
    model = train.build_model(cfg, source, CPU)
    with torch.no_grad():
        model.unet.head_gain.fill_(1)
        for module in model.unet.modules():
            if hasattr(module, "emb_gain"):
                module.emb_gain.fill_(1)
    return model.eval().requires_grad_(False), source, train.measure(source), request.param


@pytest.fixture
def game(parts):
    model, source, stats, kind = parts
    cfg = SimpleNamespace(**plain_settings(vars(sample)) | {"context": 2, "steps": 1, "scale": 1, "context_noise": 0.0})
    game = sample.Game(model, source, stats, cfg, sample.rollout_settings(cfg), CPU)
    game.an_action = {"discrete": 3, "continuous": [0.5, -1], "none": None}[kind]
    return game


@pytest.fixture
def server(game):
    server = sample.http.server.ThreadingHTTPServer(("127.0.0.1", 0), sample.Handler)
    server.game, server.daemon_threads = game, True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method="GET", path="/", body=None, timeout=10, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)
    connection.request(method, path, body if isinstance(body, (bytes, type(None))) else json.dumps(body), headers)
    answer = connection.getresponse()
    return SimpleNamespace(code=answer.status, body=answer.read(), headers=answer.headers)


def player(server):
    page = ask(server).body.decode()
    return json.loads(page.split("const game = ")[1].split(", $ =")[0])["player"]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


# ------------------------------------------------------------------------------------------------
# What is answered.


def test_a_frame_is_the_rollouts_with_the_actions_that_were_sent(game, server):
    model, source, stats = game.model, game.source, game.stats
    clips, actions = load_batch(source, [0])
    token = player(server)
    found = [ask(server, "POST", body={"player": token, "do": "frame", "action": game.an_action}) for _ in range(4)]
    if actions is not None:
        chosen = torch.tensor([[game.an_action] * 4]).to(actions.dtype)
        actions = torch.cat([actions[:, :2], chosen], dim=1)
    rollout = sample.start_rollout(model, clips[:, :2], stats, game.settings, actions)
    for t, answer in enumerate(found):
        expected = sample.to_pixels(next(rollout), stats, model.cfg.sigma_data)[0, 0].numpy()
        assert answer.code == 200 and answer.headers["X-Frame"] == f"frame {t + 3}"
        assert np.array_equal(pixels(answer.body)[1:-1, 1:-1, 0], expected)


def test_an_action_changes_the_frame_it_leads_to_where_there_are_actions(game):
    game.page()
    frames = []
    for action in (game.an_action, {"3": 1}.get(str(game.an_action), [-1, 1])):
        game.number = 0
        game.restart()
        frames.append(pixels(game.play({"player": game.player, "do": "frame", "action": action})[0]))
    assert np.array_equal(*frames) == (game.an_action is None)


def test_all_frames_are_made_in_one_thread(game, server, monkeypatch):
    """For each thread torch plans convolutions anew, and records CUDA graphs of its own."""
    threads, advance, token = [], game.rollout.advance, player(server)
    monkeypatch.setattr(game.rollout, "advance", lambda x: threads.append(threading.get_ident()) or advance(x))
    for _ in range(3):
        ask(server, "POST", body={"player": token, "do": "frame", "action": game.an_action})
    made_the_given_ones = game.worker.submit(threading.get_ident).result()
    assert threads == 3 * [made_the_given_ones] != 3 * [threading.get_ident()]


def test_a_pages_vector_is_scaled_as_in_training(game):
    if game.model.cfg.action_dim == 2:
        rms = torch.tensor(game.stats["action_rms"])
        assert (rms > 1.5).all() and torch.equal(game.read_action([0.5, -1]), torch.tensor([[[0.5, -1]]]) / rms)


def test_restarting_shows_the_next_clips_given_frames(game, server):
    token = player(server)
    for number in (1, 2):
        answer = ask(server, "POST", body={"player": token, "do": "restart"})
        given = load_batch(game.source, [number])[0][0, 1, 0].numpy()
        assert answer.headers["X-Frame"] == "frame 2" and np.array_equal(pixels(answer.body)[1:-1, 1:-1, 0], given)


def test_the_gif_holds_the_last_frames_and_no_more(game, server):
    token = player(server)
    for _ in range(3):
        ask(server, "POST", body={"player": token, "do": "frame", "action": game.an_action})
    with Image.open(io.BytesIO(ask(server, path="/gif").body)) as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert sum(durations) == 500                            # five frames; those that are alike are stored as one
    for _ in range(400):
        game.last.append(game.last[-1])
    assert len(game.last) == 300


def test_the_memory_of_an_endless_game_does_not_grow(game):
    game.page()

    def kept_after(frames):
        for _ in range(frames):
            game.play({"player": game.player, "do": "frame", "action": game.an_action})
        return sum(tensor.numel() for tensor in game.rollout.cache.tensors.values())
    assert kept_after(1) == kept_after(20) > 0
    assert game.rollout.cache.position == 23 and game.rollout.actions is None or game.rollout.actions.shape[1] == 2


def test_from_nothing_every_restart_is_another_dream_and_a_gif_begins_with_what_was_made(parts):
    model, _, stats, kind = parts
    cfg = SimpleNamespace(**plain_settings(vars(sample)) | {"context": 0, "steps": 1, "scale": 1, "context_noise": 0.0})
    game = sample.Game(model, None, stats, cfg, sample.rollout_settings(cfg), CPU)
    game.page()
    action, dreams = {"discrete": 3, "continuous": [0.5, -1], "none": None}[kind], []
    with Image.open(io.BytesIO(game.encoded(sample.write_gif, [*game.last]))) as gif:
        assert not np.asarray(gif.convert("RGB"))[1:-1, 1:-1].any()     # nothing yet: black
    for _ in range(2):
        dreams.append(pixels(game.play({"player": game.player, "do": "frame", "action": action})[0])[1:-1, 1:-1, 0])
        assert len(game.last) == 1 and np.array_equal(game.last[0][0, 0], dreams[-1])
        game.play({"player": game.player, "do": "restart"})
    assert not np.array_equal(*dreams)


def test_the_game_goes_on_while_a_gif_is_encoded(game, server, monkeypatch):
    token, write_gif, begun, end = player(server), sample.write_gif, threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert end.wait(10)
        write_gif(*arguments)
    monkeypatch.setattr(sample, "write_gif", slow)
    with ThreadPoolExecutor(1) as pool:
        gif = pool.submit(ask, server, path="/gif")
        assert begun.wait(10)
        frame = ask(server, "POST", body={"player": token, "do": "frame", "action": game.an_action}, timeout=5)
        end.set()
        assert frame.code == 200
        with Image.open(io.BytesIO(gif.result().body)) as picture:
            assert picture.n_frames == 2                    # what was there when it was asked for


def test_a_slow_reader_gets_the_whole_gif(game, server, monkeypatch):
    """Whoever reads for longer than the timeout is no silent one."""
    monkeypatch.setattr(sample.Handler, "timeout", 0.2)
    monkeypatch.setattr(game, "encoded", lambda write, frames: b"x" * 6_000_000)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.connect(("127.0.0.1", server.server_port))
        connection.sendall(b"GET /gif HTTP/1.0\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port)
        count, began = 0, time.monotonic()
        while part := connection.recv(1 << 17):
            count += len(part)
            time.sleep(0.02)
    assert count > 6_000_000 and time.monotonic() - began > 0.5         # it took longer, so the test tells


def test_a_page_that_leaves_makes_room_for_the_next(game, server):
    first = player(server)
    assert ask(server).code == 409
    assert ask(server, "POST", body={"player": "another", "do": "leave"}).code == 409 and ask(server).code == 409
    answer = ask(server, "POST", body={"player": first, "do": "leave"})
    assert answer.code == 200 and not answer.body
    late = ask(server, "POST", body={"player": first, "do": "frame", "action": game.an_action})
    assert late.code == 409 and ask(server).code == 200


def test_a_frame_that_is_not_finite_is_told_and_not_read(game, server):
    token, position = player(server), game.rollout.cache.position
    game.rollout.levels = [math.nan, 0.0]
    answer = ask(server, "POST", body={"player": token, "do": "frame", "action": game.an_action})
    assert answer.code == 500 and b"frame 3 has values that are not finite" in answer.body
    assert game.rollout.cache.position == position


# ------------------------------------------------------------------------------------------------
# What is refused, with the game untouched.


@pytest.mark.parametrize("body, code, reason", [
    ({"do": "frame", "action": "up"}, 400, "action 'up': expected"), ({"do": "frame", "action": 99}, 400, "99"),
    ({"do": "frame", "action": True}, 400, "True"), ({"do": "frame", "action": [float("inf")]}, 400, "inf"),
    ({"do": "frame", "action": [10 ** 400, 0]}, 400, "000, 0]: expected"),
    ({"do": "frame", "action": [float("nan"), 0]}, 400, "nan"),
    ({"do": "frame"}, 400, "None"), ({"do": "jump"}, 400, "frame or restart"), (b"{", 400, "no JSON"),
    (b"[" * 4000, 400, "no JSON"), (b"[1]", 400, "no JSON"), (b"\xff\xfe", 400, "no JSON"), (b"x" * 4097, 413, "4096"),
    ({"do": "frame", "player": "another"}, 409, "taken over"), ({"do": "restart", "player": None}, 409, "taken over"),
])
def test_requests_that_make_no_sense_are_refused(game, server, body, code, reason):
    if isinstance(body, dict):
        body = {"player": player(server)} | body
    before = game.rollout.cache.position
    answer = ask(server, "POST", body=body)
    if game.an_action is None and isinstance(body, dict) and body["do"] == "frame" and body["player"] == game.player:
        assert answer.code == 200                           # where there are no actions, none is read
        return
    assert answer.code == code and reason in answer.body.decode() and game.rollout.cache.position == before
    assert answer.headers["Content-Type"] == "text/plain"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"},
                                     {"Origin": "null"}, {"Origin": "http://localhost:1"}])
def test_other_hosts_and_origins_are_refused(game, server, headers):
    for method, path in (("GET", "/"), ("GET", "/gif"), ("POST", "/")):
        answer = ask(server, method, path, b"{}" if method == "POST" else None, **headers)
        assert answer.code == 403 and b"only pages of http://127.0.0.1" in answer.body
    assert game.seen < 0                                    # nobody has played


def test_without_a_player_nobody_may_play(server):
    assert ask(server, "POST", body={"do": "restart", "player": None}).code == 409
    assert ask(server, "POST", body={"do": "restart"}).code == 409


def test_a_second_player_gets_a_page_and_takes_over_when_the_first_has_gone(game, server, monkeypatch):
    first = player(server)
    second = ask(server)
    assert second.code == 409 and b"Another page is playing" in second.body
    assert ask(server, "POST", body={"player": first, "do": "frame", "action": game.an_action}).code == 200
    game.seen -= 6                                          # seconds of silence
    second = player(server)
    assert ask(server, "POST", body={"player": second, "do": "frame", "action": game.an_action}).code == 200
    assert ask(server, "POST", body={"player": first, "do": "frame", "action": game.an_action}).code == 409


def test_a_player_is_there_while_a_slow_frame_of_his_is_made(game, server, monkeypatch):
    clock, advance, first = [1000.0], game.rollout.advance, None

    def slow(action):
        clock[0] += 60                                      # seconds, as compiling takes
        return advance(action)
    monkeypatch.setattr(sample.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(game.rollout, "advance", slow)
    first = player(server)
    ask(server, "POST", body={"player": first, "do": "frame", "action": game.an_action})
    assert ask(server).code == 409


def test_what_the_user_can_mend_reaches_the_page(game, server, capfd, monkeypatch):
    def fails(action):
        raise UserError("--compile needs a C++ compiler")
    monkeypatch.setattr(game.rollout, "advance", fails)
    answer = ask(server, "POST", body={"player": player(server), "do": "frame", "action": game.an_action})
    assert answer.code == 500 and answer.body == b"--compile needs a C++ compiler"
    assert capfd.readouterr().err == ""


def test_what_is_not_there_is_refused(server):
    assert ask(server, path="/etc/passwd").code == 404 and ask(server, "POST", "/frame", b"{}").code == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest("POST", "/")
    connection.endheaders()
    assert connection.getresponse().status == 413           # no length given


def test_a_page_that_is_closed_before_its_answer_leaves_no_trace(game, server, capfd, monkeypatch):
    token, asked = player(server), threading.Event()
    advance = game.rollout.advance

    def slow(action):
        asked.set()
        time.sleep(0.2)
        return advance(action)
    monkeypatch.setattr(game.rollout, "advance", slow)
    body = json.dumps({"player": token, "do": "frame", "action": game.an_action}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # closing resets it
        connection.sendall(b"POST / HTTP/1.0\r\nHost: 127.0.0.1:%d\r\nContent-Length: %d\r\n\r\n"
                           % (server.server_port, len(body)) + body)
        asked.wait(10)
    assert ask(server, "POST", body={"player": token, "do": "restart"}).code == 200
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_what_was_asked_is_answered_before_the_server_ends(game, monkeypatch):
    """A thread that is still answering when Python ends may be ended inside torch, which aborts the whole process."""
    end_headers, answers = sample.Handler.end_headers, []

    def slow(handler):
        time.sleep(0.2)                                     # the server waits for the next request again
        signal.raise_signal(signal.SIGINT)                  # Ctrl-C, while the answer is on its way
        time.sleep(0.3)
        end_headers(handler)

    def play(url):
        server = SimpleNamespace(server_port=int(url.rsplit(":")[-1]))
        threading.Thread(target=lambda: answers.append(ask(server)), daemon=True).start()
    monkeypatch.setattr(sample.Handler, "end_headers", slow)
    monkeypatch.setattr(sample.webbrowser, "open", play)
    before, handler = threading.active_count(), signal.signal(signal.SIGINT, signal.default_int_handler)
    sample.serve(game, 0)                                   # in a shell's background, Ctrl-C would be ignored
    signal.signal(signal.SIGINT, handler)
    assert threading.active_count() <= before + 1           # that asked, and reads the answer
    time.sleep(0.1)
    assert answers[0].code == 200 and b"</script>" in answers[0].body


def test_ctrl_c_while_a_request_is_taken_up_ends_cleanly(game, monkeypatch):
    """Between the moment that a thread is noted, to be waited for, and its start."""
    start, answers = threading.Thread.start, []

    def interrupted(thread):
        if thread._target.__name__ == "process_request_thread":
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
        start(thread)

    def play(url):
        answers.append(ask(SimpleNamespace(server_port=int(url.rsplit(":")[-1]))))
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr(sample.webbrowser, "open", play)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    sample.serve(game, 0)
    signal.signal(signal.SIGINT, handler)
    time.sleep(0.1)
    assert answers[0].code == 200


def test_a_browser_in_the_terminal_finds_the_page_served(game, monkeypatch):
    """Such a browser runs until it is left: the server may not wait for it."""
    answers = []

    def browse(url):
        server = SimpleNamespace(server_port=int(url.rsplit(":")[-1]))
        with contextlib.suppress(OSError):                  # a timeout
            answers.append(ask(server, timeout=5))
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(sample.webbrowser, "open", browse)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        sample.serve(game, 0)
    signal.signal(signal.SIGINT, handler)
    assert len(answers) == 1 and answers[0].code == 200


def test_at_a_browsers_own_port_no_host_names_it(game, monkeypatch):
    """Port 80 may not be ours to open: the handler is asked alone."""
    handler = sample.Handler.__new__(sample.Handler)
    handler.server, handler.path, handler.command = SimpleNamespace(server_port=80, game=game), "/", "GET"
    for handler.headers in ({"Host": "127.0.0.1"}, {"Host": "localhost:80"}):
        assert handler.read_request() is None


def test_sliders_reach_as_far_as_the_actions_of_training(game, server):
    def told():
        game.seen = -math.inf                               # as if the page before were closed
        return json.loads(ask(server).body.decode().split("const game = ")[1].split(", $ =")[0])["reach"]
    assert told() == (4 if game.model.cfg.action_dim else 1)            # as of the five moves, or of none
    game.stats = game.stats | {"reach": 2.5}
    assert told() == 2.5


def test_a_length_of_thousands_of_digits_is_refused(server):
    assert ask(server, "POST", body=b"{}", **{"Content-Length": "9" * 5000}).code == 413


def test_a_page_that_is_torn_off_leaves_no_traceback(server, capsys):
    """In the middle of what it sends: the socket is closed without a farewell."""
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    connection.sendall(b"POST / HTTP/1.1\r\nHost")
    time.sleep(0.1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    time.sleep(0.3)
    assert ask(server).code == 200 and capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_named(game, server):
    with pytest.raises(UserError, match=f"--port={server.server_port} cannot be used"):
        sample.serve(game, server.server_port)
    with pytest.raises(UserError, match="--port=99999"):
        sample.serve(game, 99999)


def test_a_game_from_nothing_needs_no_data(game):
    """Weights that were shared, say; what kind of actions they know stands with them."""
    alone = sample.Game(game.model, None, game.stats, game.cfg, game.settings, CPU)
    alone.page()
    for expected in ("frame 1", "frame 2"):
        picture, told = alone.play({"player": alone.player, "do": "frame", "action": game.an_action})
        assert told == expected and picture[:4] == b"\x89PNG"
    alone.play({"player": alone.player, "do": "restart"})
    assert alone.rollout.cache.position == 0 and alone.continuous == game.continuous


def test_latents_cannot_be_played(game):
    with pytest.raises(UserError, match="this model makes latents"):
        sample.Game(game.model, game.source, game.stats | {"latent": True}, game.cfg, game.settings, CPU)


# ------------------------------------------------------------------------------------------------
# The command, and a browser.


@pytest.fixture(scope="module")
def playing(tmp_path_factory):
    """`python sample.py --play` of a world after two steps: the process and its address."""
    folder = tmp_path_factory.mktemp("play")
    digits = write_digits(folder / "mnist")
    train.main(read_settings(vars(train), [f"--{key}={value}" for key, value in WORLD.items()]
                             + [f"--data_dir={digits}", f"--out_dir={folder}/out"]))
    process = start(folder, "sample.py", "--play", "--port=0", "--context=2", "--steps=1", "--fps=20", "--device=cpu")
    for line in process.stdout:
        if "play at" in line:
            break
    yield process, line.split()[2].rstrip(";")
    process.kill()


def test_a_cpus_threads_work_for_the_thread_that_plays_alone(tmp_path, monkeypatch):
    """OpenMP's threads that work for one thread and those that work for another would wait for each other's cores."""
    digits, seen = write_digits(tmp_path / "mnist"), []
    changes = WORLD | {"max_steps": 1, "data_dir": digits, "out_dir": tmp_path / "out"}
    train.main(read_settings(vars(train), [f"--{key}={value}" for key, value in changes.items()]))
    monkeypatch.setattr(sample, "serve", lambda game, port: seen.append(
        [torch.get_num_threads(), game.worker.submit(torch.get_num_threads).result()]))
    torch.set_num_threads(3)
    try:
        sample.main(read_settings(vars(sample), ["--play", f"--checkpoint={tmp_path}/out", "--device=cpu"]))
    finally:
        torch.set_num_threads(1)
    assert seen == [[1, 3]]


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """Chromium without a window; downloads go to tmp_path."""
    selenium = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", f"user-data-dir={tmp_path}/profile"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    browser = selenium.Chrome(options, selenium.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


WATCH = """window.sent = []; const real = fetch
    window.fetch = (url, how) => { sent.push(JSON.parse(how.body).action); return real(url, how) }
    const beacon = navigator.sendBeacon.bind(navigator)
    navigator.sendBeacon = (url, body) => { sessionStorage.left = body; return beacon(url, body) }"""


def test_a_browser_plays(playing, browser, tmp_path):
    process, url = playing
    browser.get(url)

    def frame():
        words = browser.find_element("id", "status").text.split()
        return int(words[1].rstrip(",")) if words[0] == "frame" else None
    until(lambda: (frame() or 0) > 5)
    assert "frames per second" in browser.find_element("id", "status").text
    # what the page sends with each frame, seen by a wrapper around fetch
    browser.execute_script(WATCH)
    from selenium.webdriver import ActionChains, Keys
    actions = ActionChains(browser)
    until(lambda: 0 in browser.execute_script("return sent"))
    actions.key_down(Keys.ARROW_LEFT).perform()
    until(lambda: browser.execute_script("return sent").count(3) > 3)  # as long as it is held
    actions.key_up(Keys.ARROW_LEFT).perform()
    until(lambda: browser.execute_script("return sent.at(-1)") == 0)
    actions.send_keys("2").perform()
    until(lambda: 2 in browser.execute_script("return sent"))          # a tap, however short
    actions.key_down("4").key_down(Keys.SHIFT).perform()
    until(lambda: 4 in browser.execute_script("return sent"))
    browser.execute_script("onkeyup({key: '$', code: 'Digit4'})")      # what it is called with shift
    until(lambda: browser.execute_script("return sent.at(-1)") == 0)
    actions.key_up("4").key_up(Keys.SHIFT).key_down(Keys.CONTROL).send_keys("1").key_up(Keys.CONTROL).perform()
    time.sleep(0.3)
    assert 1 not in browser.execute_script("return sent")              # a shortcut of the browser's
    browser.refresh()
    until(lambda: browser.find_elements("id", "status") and (frame() or 0) > 5)
    assert json.loads(browser.execute_script("return sessionStorage.left"))["do"] == "leave"   # the page before did
    browser.execute_script(WATCH)
    until(lambda: browser.execute_script("return sent.length") > 10)
    browser.execute_script("document.getElementById('gif').click()")
    until(lambda: browser.execute_script("return sent.length") > 20)   # it goes on
    until(lambda: list(tmp_path.glob("*.gif")))[0].unlink()

    browser.find_element("id", "pause").click()
    until(lambda: browser.find_element("id", "status").text == "paused")
    count = browser.execute_script("return sent.length")
    time.sleep(0.5)
    assert browser.execute_script("return sent.length") == count
    browser.find_element("id", "gif").click()
    saved = until(lambda: [path for path in tmp_path.glob("*.gif") if path.stat().st_size])[0]
    with Image.open(saved) as gif:
        assert gif.n_frames >= count // 2
    browser.find_element("id", "restart").click()
    browser.find_element("id", "pause").click()
    until(lambda: frame() is not None)
    assert frame() < count

    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.code == 0 and "ended" in ended.out and "Traceback" not in ended.err


@pytest.mark.parametrize("parts", ["continuous"], indirect=True)
def test_arrow_keys_move_the_chosen_slider(parts, server, browser):
    browser.get(f"http://127.0.0.1:{server.server_port}")
    browser.execute_script(WATCH)
    from selenium.webdriver import ActionChains, Keys
    until(lambda: [0, 0] in browser.execute_script("return sent"))
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()         # the first is chosen from the beginning
    until(lambda: [0.2, 0] in browser.execute_script("return sent"))    # a twentieth of how far actions reach
    ActionChains(browser).send_keys(Keys.TAB, Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    until(lambda: [0.2, -0.4] in browser.execute_script("return sent"))


@pytest.mark.parametrize("latents, named", [
    (np.zeros((3, 4, 8, 6), np.float32), r"own\.npy: a latent of \(4, 8, 6\), expected \(4, 8, 8\)"),
    (np.full((3, 4, 8, 8), 1e5, np.float32), r"own\.npy holds latents that are not finite in float16"),
    (np.zeros((0, 4, 8, 8), np.float32), r"own\.npy has no frames"),
])
def test_latents_that_a_model_cannot_go_on_from_are_named(tmp_path, latents, named):
    np.save(tmp_path / "own.npy", latents)
    with pytest.raises(UserError, match=named):
        sample.read_prompt(tmp_path / "own.npy", 2, 1, (4, 8, 8), latent=True)


def test_nothing_is_played_without_data_or_from_a_prompt():
    cfg = SimpleNamespace(**plain_settings(vars(sample)) | {"play": True, "prompt": "a.gif"})
    with pytest.raises(UserError, match="--truth and --play need clips of the data"):
        sample.check_settings(cfg)
    sample.check_settings(SimpleNamespace(**vars(cfg) | {"prompt": "", "context": 30}))     # above `frames`
