"""The checks before the paper run: each failure names its remedy, nothing is started; and run.sh, which obeys them."""

import socket
from pathlib import Path

import pytest
from conftest import run_script
from endpoint import endpoint, raw, status

from common.memory import gpu_gib
from common.offline.tiny_model import tiny_policy

MODELS = raw({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "us"}]})


def check(*flags: object, **environment: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    """(exit code, check -> (verdict, what was said with its remedy), all of stdout)"""
    done = run_script("tools/check.py", *flags, NO_PROXY="127.0.0.1", **environment)
    assert "Traceback" not in done.stderr, done.stderr
    found, name = {}, ""
    for line in done.stdout.partition("\n\n")[0].splitlines():
        if line.startswith(("ok", "FAILS")):
            name = line[7:22].strip()
            found[name] = (line[:6].strip(), line[23:])
        else:
            found[name] = (found[name][0], found[name][1] + line.strip())
    return done.returncode, found, done.stdout


@pytest.mark.skipif(gpu_gib() is not None, reason="there is a GPU here")
def test_a_machine_that_has_none_of_it_is_told_all_of_it(tmp_path: Path) -> None:
    code, found, _ = check(HF_HOME=str(tmp_path))
    assert code == 2 and set(found) == {
        "GPU and driver", "GPU memory", "memory", "disk", "models", "engine", "endpoint"
    }  # fmt: skip
    failing = {name: said for name, (verdict, said) in found.items() if verdict == "FAILS"}
    assert "remedy: use a machine with an NVIDIA GPU" in failing["GPU and driver"]
    for name in ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-32B-Instruct-AWQ"):
        assert f"hf download {name}" in failing["models"]
    assert all("remedy: " in said for said in failing.values())
    assert found["GPU memory"][0] == "ok" and "computed, not measured" in found["GPU memory"][1]


def test_what_is_there_passes() -> None:
    with endpoint() as server:
        server.models = MODELS
        _, found, _ = check("--base-url", server.url, "--model", "m", "--policy", tiny_policy())
        assert {found[name][0] for name in ("memory", "disk", "models", "endpoint")} == {"ok"}
        assert not server.asked  # nothing was spent


@pytest.mark.parametrize(
    ("models", "remedy"), [(status(401), "set OPENAI_API_KEY"), (MODELS, "name one with --model: m")]
)
def test_an_endpoint_that_will_not_do(models: object, remedy: str) -> None:
    with endpoint() as server:
        server.models = models
        _, found, _ = check("--base-url", server.url, "--policy", tiny_policy())
    assert found["endpoint"][0] == "FAILS" and remedy in found["endpoint"][1]


def test_a_port_where_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, found, _ = check("--base-url", f"http://127.0.0.1:{port}/v1")
    assert found["endpoint"][0] == "FAILS" and "does not answer" in found["endpoint"][1]


def test_a_proxy_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    done = run_script("tools/check.py", "--base-url", "http://judge.invalid/v1")
    assert "Traceback" not in done.stderr and "by way of ALL_PROXY" in done.stdout
    assert "name an http:// proxy there, or none" in done.stdout


def test_the_port_of_the_judges_server_has_to_be_free() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        except OSError:
            pass  # something else listens there, which is as good
        _, found, _ = check()
    assert found["endpoint"][0] == "FAILS" and "port 8000 is taken" in found["endpoint"][1]


def test_a_server_named_by_the_default_address_is_asked() -> None:
    """tools/with_judge.sh advises it where its port is taken."""
    _, found, _ = check("--base-url", "http://127.0.0.1:8000/v1", "--policy", tiny_policy())
    assert "port 8000" not in found["endpoint"][1]  # it was asked, whatever it answered


def test_the_best_settings_that_fit_are_taken() -> None:
    for gib, words in (
        (80, "7B-Instruct in 4 bits, --micro-batch 16"),
        (48, "7B-Instruct in 4 bits, --engine hf --micro-batch 8"),
    ):
        verdict, said = check("--gpu-memory", gib)[1]["GPU memory"]
        assert verdict == "ok" and said.endswith(words)
    # A flag of the user's wins, and counts.
    verdict, said = check("--gpu-memory", 80, "--micro-batch", 8, "--judge-memory", 40)[1]["GPU memory"]
    assert verdict == "FAILS" or "--micro-batch 8" in said
    assert check("--gpu-memory", 40, "--judge-memory", 0)[1]["GPU memory"][0] == "ok"


def test_where_no_judge_fits_one_elsewhere_is_advised() -> None:
    verdict, said = check("--gpu-memory", 24)[1]["GPU memory"]
    assert verdict == "FAILS" and "name a judge elsewhere with --base-url: Qwen/Qwen2.5-7B-Instruct then fits" in said
    assert check("--gpu-memory", 24, "--base-url", "https://judge.invalid/v1")[1]["GPU memory"][0] == "ok"
    verdict, said = check("--gpu-memory", 3)[1]["GPU memory"]
    assert verdict == "FAILS" and "use a larger GPU" in said


def test_run_sh_is_told_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from tools import check as tool

    monkeypatch.setattr(tool, "gpu", lambda args: ("", "a GPU"))

    def chosen(*flags: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["check.py", "--choose", *flags])
        assert tool.main(tool.choose()) == 0
        return capsys.readouterr().out.split("\n")

    assert chosen("--gpu-memory", "48") == [
        "--policy Qwen/Qwen2.5-7B-Instruct --bits 4", "--engine hf", "--micro-batch 8", "26", ""
    ]  # fmt: skip
    elsewhere = ("--base-url", "https://judge.invalid/v1", "--gpu-memory")
    assert chosen(*elsewhere, "12")[:3] == [
        "--policy Qwen/Qwen2.5-1.5B-Instruct --bits 4", "", "--micro-batch 4 --sleep"
    ]  # fmt: skip
    mine = chosen(*elsewhere, "80", "--policy", str(tiny_policy()), "--bits", "16")
    assert mine[0] == "--bits 16"  # a path may hold spaces, and is a flag of the command line anyway
    monkeypatch.setenv("JUDGE_MEMORY", "20")
    assert chosen("--gpu-memory", "48")[3] == "20"
    monkeypatch.setattr("sys.argv", ["check.py", "--choose", "--gpu-memory", "24"])
    with pytest.raises(SystemExit):
        tool.main(tool.choose())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--base-url" in err


def test_money_follows_from_the_counts() -> None:
    def last(*flags: object) -> list[float]:
        return [float(x) for x in check(*flags)[2].splitlines()[-1].split()[1:]]

    calls, greetings, hours, money = last("--price-in", 1, "--price-out", 2)
    assert calls > 20000 and greetings > 17000 and hours > 0
    assert money == pytest.approx(calls * (700 + 2 * 160) / 1e6, rel=0.01)
    less = last("--epochs", 1)  # GRPO's flags are step 4's
    assert less[0] < calls - 5000 and less[3] == 0
