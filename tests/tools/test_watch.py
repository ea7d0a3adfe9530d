"""tools.watch: the page follows the run directories, shows no unrecorded look, and answers nobody else."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, environment
from run_helpers import evaluation, make_run, step

from blockgpt.errors import UserError
from blockgpt.experiments.report.live import LivePage, PageServer, check_folder
from blockgpt.experiments.report.studies import WITHHELD, read_study
from blockgpt.experiments.sweeps.plan import Plan, PlannedRun, write_plan
from blockgpt.experiments.sweeps.runner import append_line, read_outcome, record_look
from compare_architectures import load_run
from tools import watch

NOISE = (0.02, -0.01, 0.03)


@pytest.fixture
def serve():
    """Starts the server of a folder; gives a function (path, headers, method) → (status, text)."""
    servers = []

    def start(folder):
        server = PageServer(LivePage(folder, load_run), 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        port = server.server_address[1]

        def get(path="/", method="GET", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                if value is not None:
                    connection.putheader(name, value.format(port=port))
            connection.endheaders()
            response = connection.getresponse()
            text = response.read().decode()
            connection.close()
            get.headers = dict(response.getheaders())
            return response.status, text

        return get

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def append(run, record):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def curve_points(html):
    """{variant: points of its curve against tokens}."""
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    return {data["variants"][str(one["v"])]: len(one["p"]) for one in data["charts"][0]["series"]}


def test_the_page_follows_the_runs(tmp_path, serve):
    run = make_run(tmp_path / "a", step(1), evaluation(100, 2.5), seed=1)
    get = serve(tmp_path)
    status, html = get()
    version = get("/version")[1]
    assert status == 200 and list(curve_points(html).values()) == [1]
    assert f'data-live="{version}"' in html and get("/version")[1] == version
    append(run, evaluation(200, 2.0))
    assert get("/version")[1] != version
    assert list(curve_points(get()[1]).values()) == [2]
    make_run(tmp_path / "b", seed=1, preset="gpt2")
    (tmp_path / "b/run.json").write_text("{")  # a log that is torn does not end it
    html = get()[1]
    assert len(curve_points(html)) == 1 and "b: broken: run.json is not JSON" in html
    assert "compare_architectures.py --baseline NAME" in html
    (tmp_path / "study.json").write_text("[]")
    assert "study.json: is not what tools.ablate writes" in get()[1] and get("/version")[0] == 200


def test_nothing_is_answered_but_a_get_of_its_two_paths_from_this_computer(tmp_path, serve):
    make_run(tmp_path / "a", seed=1)
    (tmp_path / "secret.txt").write_text("secret")
    get = serve(tmp_path)
    for host in ("127.0.0.1:{port}", "localhost:{port}"):
        assert get(Host=host)[0] == 200
    for host in ("evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", None):
        assert get(Host=host) == (421, "421 wrong Host\n"), host
    for path in ("/secret.txt", "/../secret.txt", "/a/run.json", "/%2e%2e/secret.txt", "/?x", "/version/",
                 f"{tmp_path}/secret.txt", "/index.html"):
        assert get(path)[0] == 404, path
    for method in ("POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "X"):
        assert get(method=method)[0] == 405, method
    get()
    assert get.headers["X-Content-Type-Options"] == "nosniff" and get.headers["Cache-Control"] == "no-store"
    assert not [name for name in get.headers if name.startswith("Access-Control")]


def make_study(folder, seeds=(1, 2, 3)):
    """A study of two variants; its runs, all finished."""
    variants = {"ln": {"normalization": "layernorm"}, "rms": {"normalization": "rmsnorm"}}
    runs = [PlannedRun(f"{variant}{seed}", f"arch-s{seed}-{variant}{seed}", variant, "base", seed, ("--seed=1",),
                       tokens=200 * 2048, steps=200, block=f"seed {seed}") for seed in seeds for variant in variants]
    write_plan(folder, Plan("study", ("config/a.py",), variants, "ln", question="Which?", seeds=seeds), runs)
    for run in runs:
        worse = NOISE[run.seed - 1] + (run.variant == "rms") * (0.5 + 0.01 * run.seed)
        make_run(folder / run.name, step(1), evaluation(100, 3.5), evaluation(200, 2 + worse), seed=run.seed)
    return runs


def outcomes_of(folder, runs):
    return {run.id: read_outcome(folder / run.name) for run in runs}


def test_a_study_has_the_verdicts_of_recorded_looks_alone(tmp_path, serve):
    runs = make_study(tmp_path)
    get = serve(tmp_path)
    html = get()[1]
    assert WITHHELD in html and 'class="badge worse"' not in html and "+0.5200, n=3" in html and "Which?" in html
    record_look(tmp_path, runs, outcomes_of(tmp_path, runs))
    html = get()[1]
    assert WITHHELD not in html and '<span class="badge worse">worse</span>' in html and "look 1" in html
    assert len((tmp_path / "looks.jsonl").read_text().splitlines()) == 1  # a page is no look

    record = json.loads((tmp_path / runs[0].name / "run.json").read_text())
    (tmp_path / runs[0].name / "run.json").write_text(json.dumps({**record, "status": "running"}))
    assert WITHHELD in get()[1]
    assert len((tmp_path / "looks.jsonl").read_text().splitlines()) == 1


def test_a_run_of_a_study_that_failed_is_on_the_page(tmp_path, serve):
    runs = make_study(tmp_path)
    record = json.loads((tmp_path / runs[1].name / "run.json").read_text())
    (tmp_path / runs[1].name / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    (tmp_path / runs[1].name / "sweep").mkdir()
    append_line(tmp_path / runs[1].name / "sweep/attempts.jsonl", {"state": "diverged", "reason": "loss <nan>"})
    html = serve(tmp_path)()[1]
    assert "rms, seed 1 (arch-s1-rms1): diverged: loss &lt;nan&gt;" in html
    assert "is not a whole block: rms diverged" in html


def test_a_plan_is_read_back_as_it_was_declared(tmp_path):
    runs = make_study(tmp_path)
    plan, found = read_study(tmp_path)
    assert found == runs and plan == Plan("study", ("config/a.py",), plan.variants, "ln", question="Which?",
                                          seeds=(1, 2, 3))
    record = json.loads((tmp_path / "study.json").read_text())
    record["runs"][0]["run"] = "../../etc"
    (tmp_path / "study.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is not the name of a folder"):
        read_study(tmp_path)


def test_a_mistake_is_one_line(tmp_path, serve):
    with pytest.raises(UserError, match="no such folder"):
        check_folder(tmp_path / "absent")
    make_study(tmp_path / "study")
    with pytest.raises(UserError, match=f"has studies: watch one of them, such as {tmp_path}/study"):
        watch.main([str(tmp_path)])
    with pytest.raises(UserError, match="--port: 70000 is out of range"):
        watch.main([str(tmp_path / "study"), "--port=70000"])
    with PageServer(LivePage(tmp_path, load_run), 0) as first, pytest.raises(
            UserError, match=r"--port: \d+ is taken \(--port=0 takes one that is free\)"):
        watch.main([str(tmp_path / "study"), f"--port={first.server_address[1]}"])


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(tmp_path):
    make_run(tmp_path / "a", seed=1)
    process = subprocess.Popen([sys.executable, "-m", "tools.watch", str(tmp_path), "--port=0"], cwd=ROOT,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    url = process.stdout.readline().split()[0]
    host = url.removeprefix("http://").removesuffix("/")
    assert host.startswith("127.0.0.1:")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n"
    assert not list(Path(tmp_path).glob("*.html"))
