"""The report as a W&B Report: what is sent to a server on this machine, and what ends in one line."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rlg import report
from rlg.reports import wandb_report
from tests.reports.test_report_runs import evaluation, score, training
from tests.support import fake_wandb

wandb = pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")
from wandb.sdk.lib.service.service_process import ServiceProcess  # noqa: E402  it needs wandb

HOSTILE = "x</script><img src=1 onerror=alert(1)>|`b` [l](javascript:y)"


@pytest.fixture
def server() -> Iterator[fake_wandb.FakeWandb]:
    """W&B, on this machine."""
    with fake_wandb.serve() as fake:
        yield fake


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two training runs with hostile values, the first of them evaluated."""
    first = training(tmp_path / "a", [1.0, 2.0, 3.0], beta=0.1, kernel=HOSTILE)
    evaluation(first / "eval" / "one", score(0, 0.0) + score(1, 1.0) + score(2, 1.5))
    return [first, training(tmp_path / "b", [1.0, 1.5], learning_rate=1e-2, kernel="ode")]


@pytest.fixture(autouse=True)
def signed_in(server: fake_wandb.FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account at the server, and none of this machine's."""
    forget()  # a service that another test began is named in the environment, which would come back without it
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    environment = {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
    environment |= {f"WANDB_{name}_DIR": tmp_path / "w" for name in ("DATA", "CACHE", "CONFIG")}
    for name, value in (environment | {"WANDB_BASE_URL": server.url}).items():
        monkeypatch.setenv(name, str(value))
    forget()
    yield
    forget()


def joined(service: ServiceProcess, seconds: float = 20.0) -> int:
    """As `ServiceProcess.join`, which waits without a limit: now and then the service does not end."""
    try:
        return service._process.wait(seconds)
    except subprocess.TimeoutExpired:
        service._process.kill()
        service._process.wait()
        return 0


def forget() -> None:
    """W&B reads its settings from the environment again, at the next use."""
    with mock.patch.object(ServiceProcess, "join", joined):
        wandb.teardown()
    wandb.sdk.lib.wbauth.unauthenticate_session(update_settings=False)


def published(capfd: pytest.CaptureFixture, *arguments: Any) -> list[str]:
    """The last two lines that python -m rlg.report prints: the report's address, and the page."""
    report.main(list(map(str, arguments)))
    return capfd.readouterr().out.splitlines()[-2:]


def find(spec: Any, key: str, value: Any) -> list[dict[str, Any]]:
    """All mappings of a nested structure with this value under a key."""
    inside = list(spec.values()) if isinstance(spec, dict) else spec if isinstance(spec, list) else []
    own = [spec] if isinstance(spec, dict) and spec.get(key) == value else []
    return own + [found for each in inside for found in find(each, key, value)]


def test_what_is_published(runs: list[Path], server: fake_wandb.FakeWandb, capfd: pytest.CaptureFixture) -> None:
    page = runs[0].parent / "report" / "report.html"
    address, printed = published(capfd, *runs, "--wandb", "lab/guided")
    assert address.startswith(f"{server.url}/lab/guided/reports/") and printed == str(page)
    (sent,) = server.reports
    assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("lab", "guided", "a · b")
    blocks = sent["spec"]["blocks"]
    heads = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert heads == ["Figures", "Runs", "Best w", "Frontier of fit on tiny", "Evaluations"]

    tables = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert "| a | finished | 3 | 3 | " in tables[0] and "| b | interrupted | 2 | 1.5 | " in tables[0]
    assert "<" not in tables[0] and HOSTILE in html.unescape(tables[0]) and "](" not in tables[0]
    assert "| a | fit | 2 &#91;0, 2&#93; | 1.705 &#91;" in tables[1] and tables[1].rstrip().endswith("| 4 | 4 |")
    assert tables[2].count("\n") == 4  # w = 0, 1 and 2 are on the frontier

    (images,) = server.runs
    assert server.runs[images]["entity"] == "lab" and server.runs[images]["jobType"] == "report"
    pictures = {
        name.rpartition("/")[2].partition("_0_")[0]: data for name, data in server.files.items() if "media" in name
    }
    for name in ("frontier", "parameters", "best_w"):
        assert pictures[name] == (page.parent / f"{name}.png").read_bytes()
        assert find(blocks, "mediaKeys", [f"report/{name}"])
    sets = {runset["name"]: json.dumps(runset) for runset in find(blocks, "enabled", True) if "runFeed" in runset}
    assert images in sets["figures"]
    assert '"train"' in sets["training"] and '"a"' in sets["training"] and '"b"' in sets["training"]
    assert '"evaluate"' in sets["evaluations"]

    lines = [panel["config"] for panel in find(blocks, "viewType", "Run History Line Plot")]
    assert {tuple(config["metrics"]) for config in lines} >= {
        ("reward/fit",),
        ("reward",),
        ("guided/fit",),
        ("guided/held",),
    }
    (parallel,) = find(blocks, "viewType", "Parallel Coordinates Plot")
    axes = [column["accessor"] for column in parallel["config"]["columns"]]
    assert axes == [*(f"config:{name}.value" for name in ("beta", "kernel", "learning_rate")), "summary:reward/fit"]
    assert "evaluation/points" in json.dumps(blocks)


def test_evaluations_alone_are_published_too(
    runs: list[Path], server: fake_wandb.FakeWandb, capfd: pytest.CaptureFixture
) -> None:
    published(capfd, runs[0] / "eval" / "one", "--wandb", "lab/guided")
    (sent,) = server.reports
    assert not find(sent["spec"], "viewType", "Parallel Coordinates Plot")


@pytest.mark.parametrize(
    ("environment", "refuse", "reason"),
    [
        ({"WANDB_API_KEY": ""}, "", "W&B: No API key configured"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "", "W&B: Failed to authenticate with http://127.0.0.1:9"),
        ({"WANDB_MODE": "offline"}, "", "--wandb publishes to W&B's server, and WANDB_MODE is offline"),
        ({}, "upsertView", "permission denied"),
    ],
    ids=["account", "network", "offline", "refused"],
)
def test_what_can_not_be_published_is_one_line(
    environment: dict[str, str],
    refuse: str,
    reason: str,
    runs: list[Path],
    server: fake_wandb.FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    server.refuse = refuse
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if environment.get("WANDB_API_KEY") == "":
        monkeypatch.delenv("WANDB_API_KEY")
    forget()
    with pytest.raises(SystemExit) as stopped:
        report.main([*map(str, runs), "--wandb", "lab/guided"])
    assert stopped.value.code == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert reason in line and errors.rstrip().endswith(line)
    assert (runs[0].parent / "report" / "report.html").is_file() == bool(refuse)  # else nothing was begun


@pytest.mark.parametrize("target", ["lab", "lab/", "/x", "a/b/c", "https://wandb.ai/a/b", ""])
def test_a_target_is_an_entity_and_a_project(target: str, runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="--wandb takes ENTITY/PROJECT"):
        wandb_report.check(target)
    with pytest.raises(SystemExit):
        report.main([str(runs[0]), "--wandb", "lab"])
    assert capsys.readouterr().err == "error: --wandb takes ENTITY/PROJECT, got 'lab'\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[wandb\]' in a clone"):
        wandb_report.check("a/b")


def test_long_tables_are_cut() -> None:
    table = wandb_report._table(["a|b", "c"], [[i, 0.123456] for i in range(201)])
    assert table.startswith("| a&#124;b | c |\n| --- | --- |\n| 0 | 0.1235 |\n")
    assert table.endswith("| 199 | 0.1235 |\n\n1 more rows are in runs.csv.")
