"""`nemotron-h exec`: the process it becomes, the hook in every Python below it, and three real tools under it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from nemotron_h.bundled import WORD_PROBLEMS, held_out, read_answer
from nemotron_h.cli.exec import LOG, ON_PATH

OURS = "nemotron_h.modeling.NemotronHForCausalLM"
EXEC = [sys.executable, "-m", "nemotron_h", "exec"]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", LOG)}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def hooked(code: str, *path: Path, check: bool = True) -> subprocess.CompletedProcess:
    """A Python as `exec` starts it, with more folders behind the hook's."""
    variables = environment(PYTHONPATH=os.pathsep.join([ON_PATH, *map(str, path)]))
    line = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(line, env=variables, capture_output=True, text=True, check=check)


def test_the_command_line_that_is_run(cli, monkeypatch, tmp_path) -> None:
    """Options behind COMMAND are COMMAND's, whatever they are called."""
    ran = []
    monkeypatch.setattr(os, "execve", lambda *arguments: ran.append(arguments))
    monkeypatch.setenv("PYTHONPATH", "/mine")
    cli("exec", "--log", str(tmp_path / "log"), "python", "-m", "x", "--log", "y", "-h", "--json")
    ((program, line, variables),) = ran
    assert os.path.dirname(program) == os.path.dirname(sys.executable)  # beside this Python, PATH or not
    assert line[1:] == ["-m", "x", "--log", "y", "-h", "--json"]
    assert variables["PYTHONPATH"] == f"{ON_PATH}{os.pathsep}/mine"
    assert variables[LOG] == str(tmp_path / "log")
    (tmp_path / "train.py").touch()
    cli("exec", str(tmp_path / "train.py"), "--lr", "1")
    assert ran[1][1] == [sys.executable, str(tmp_path / "train.py"), "--lr", "1"]


def test_refusals(refused, cli, tmp_path) -> None:
    assert "There is no program 'no-such-tool'" in refused("exec", "no-such-tool")
    (tmp_path / "plain.txt").touch()
    assert "chmod +x" in refused("exec", str(tmp_path / "plain.txt"))
    assert "Example: nemotron-h exec trl sft" in cli("exec", "--help").stdout


def test_a_log_that_cannot_be_written(refused, cli, monkeypatch, tmp_path) -> None:
    """Said before the tool starts: in the tool, no model of the family could be made."""
    ran = []
    monkeypatch.setattr(os, "execve", lambda *arguments: ran.append(arguments))
    absent = str(tmp_path / "absent" / "log")
    said = refused("exec", "--log", absent, "python")
    assert f"--log {absent} cannot be written (No such file or directory); name a file" in said
    monkeypatch.setenv(LOG, str(tmp_path))
    assert f"{LOG} {tmp_path} cannot be written (Is a directory)" in refused("exec", "python")
    assert not ran
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_text("a line\n")
    monkeypatch.setenv(LOG, "log")  # whichever folder the tool's processes run in
    cli("exec", "python")
    assert ran[0][2][LOG] == str(tmp_path / "log") and (tmp_path / "log").read_text() == "a line\n"
    monkeypatch.setenv(LOG, "")
    cli("exec", "python")
    assert ran[1][2][LOG] == ""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_exit_code_and_signals_are_the_tools() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(43)); print('up', flush=True)"
    code += "; time.sleep(60)"
    process = subprocess.Popen([*EXEC, sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(timeout=30) == 43
    process.stdout.close()


@pytest.mark.core
def test_nothing_is_imported_until_transformers_is() -> None:
    """And then the classes are there, in the process and in its children, without a word in the script."""
    code = f"""
        import subprocess, sys
        assert not {{"torch", "transformers", "nemotron_h", "importlib.resources"}} & set(sys.modules)
        assert {ON_PATH!r} not in sys.path
        if len(sys.argv) == 1:
            sys.exit(subprocess.call([sys.executable, "-c", {{code}}, "child"]))
        import importlib.util
        assert importlib.util.find_spec("transformers").origin and "transformers" not in sys.modules
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({WORD_PROBLEMS!r})
        import importlib.resources, inspect, transformers
        assert type(model) is transformers.NemotronHForCausalLM and transformers.NemotronHConfig is type(model.config)
        assert importlib.resources.files("transformers").joinpath("__init__.py").is_file()
        assert "_LazyModule" in inspect.getsource(transformers)
        print(f"{{type(model).__module__}}.{{type(model).__qualname__}}")
    """
    code = textwrap.dedent(code)
    code = code.replace("{code}", repr(code.replace("{code}", "''").replace("{{", "{").replace("}}", "}")))
    assert hooked(code.replace("{{", "{").replace("}}", "}")).stdout.strip() == OURS


def test_it_stands_in_front_of_another_sitecustomize(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = __name__, __file__\n")
    code = "import sys, sitecustomize; print(sys.mine == ('sitecustomize', sitecustomize.__file__), sys.mine[1])"
    assert hooked(code, tmp_path).stdout.split() == ["True", str(tmp_path / "sitecustomize.py")]


def test_versions_that_do_not_go_together(tmp_path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.1.0'\n")
    result = hooked("import transformers", tmp_path, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "cannot register itself with transformers 4.1.0" in last and "without `nemotron-h exec`" in last


def run_tool(*line: str, log: Path) -> tuple[str, set[str]]:
    """What a tool printed under `nemotron-h exec`, and the classes that were used in it."""
    line = (*EXEC, "--log", str(log), *line)
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, cwd=log.parent)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr, classes(log)


def classes(log: Path) -> set[str]:
    return {line.split()[-1] for line in log.read_text().splitlines()} if log.exists() else set()


def test_trl_sft(tmp_path) -> None:
    pytest.importorskip("trl", reason="pip install 'nemotron-h[train]' for it")
    rows = [
        {"messages": [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": "So 7."}]}
        for problem in held_out()[:4]
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "--model_name_or_path": WORD_PROBLEMS,
        "--dataset_name": str(tmp_path / "data"),
        "--output_dir": str(tmp_path / "out"),
        "--max_steps": "2",
        "--per_device_train_batch_size": "2",
        "--report_to": "none",
        "--bf16": "false",
    }
    line = [word for pair in options.items() for word in pair]
    text, used = run_tool("trl", "sft", *line, "--use_cpu", log=tmp_path / "log")
    assert OURS in used and not any(name.startswith("transformers.") for name in used)
    assert "train_loss" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M*-M*-"  # transformers' own class writes none


def test_lm_eval(tmp_path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'nemotron-h[eval]' for it")
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in held_out()[:4]))
    task = r"""
        task: word_problems
        dataset_path: json
        dataset_kwargs: {data_files: {test: FILE}}
        test_split: test
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: ["<SPECIAL_12>"], max_gen_toks: 256, do_sample: false}
        filter_list:
          - name: last-number
            filter: [{function: regex, regex_pattern: "(\\d+)", group_select: -1}, {function: take_first}]
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """
    (tmp_path / "word_problems.yaml").write_text(
        textwrap.dedent(task).replace("FILE", str(tmp_path / "held_out.jsonl"))
    )
    line = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={WORD_PROBLEMS},dtype=float32"]
    line += ["--include_path", str(tmp_path), "--tasks", "word_problems", "--apply_chat_template", "--device", "cpu"]
    _, used = run_tool(*line, "--output_path", str(tmp_path / "results"), log=tmp_path / "log")
    assert used and OURS in used and not any(name.startswith("transformers.") for name in used)
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["word_problems"]
    # The first of them is one that the model gets wrong (see figures.json).
    assert results["exact_match,last-number"] == 0.75


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_transformers_serve(tmp_path) -> None:
    pytest.importorskip("fastapi", reason="pip install 'nemotron-h[serve]' for it")
    pytest.importorskip("uvicorn", reason="pip install 'nemotron-h[serve]' for it")
    if shutil.which("transformers", path=os.path.dirname(sys.executable)) is None:
        pytest.skip("the command `transformers` is not beside this Python")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [*EXEC, "--log", str(tmp_path / "log"), "transformers", "serve", WORD_PROBLEMS]
    line += ["--host", "localhost", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "out", "w") as out:
        server = subprocess.Popen(line, env=environment(), stdout=out, stderr=out)
    try:
        question = "Anna has 12 apples. She buys 7 more. How many apples does Anna have now?"
        body = {"model": WORD_PROBLEMS, "messages": [{"role": "user", "content": question}], "max_tokens": 128}
        reply = post(server, f"http://localhost:{port}/v1/chat/completions", body, tmp_path / "out")
        assert read_answer(reply["choices"][0]["message"]["content"]) == 19
    finally:
        server.terminate()  # reaches the tool itself: exec leaves no process in between
        server.wait(timeout=30)
    used = classes(tmp_path / "log")
    assert OURS in used and not any(name.startswith("transformers.") for name in used)


def post(server: subprocess.Popen, url: str, body: dict, out: Path) -> dict:
    """The server's answer, once it is up."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(out.read_text()[-4000:]) from None
            time.sleep(0.5)
