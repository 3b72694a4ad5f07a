"""The command `app` as far as it goes without Gradio; test_page.py has the page."""

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pipelines.app import POLICY, SameOriginOnly, _is_loopback, serve
from pipelines.page_configs import AppConfig
from tokenizer.storage.errors import InputError


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^the page needs Gradio: pip install -e "\.\[app\]"'):
        serve(AppConfig(run_dir="runs/mine"))


def test_a_run_that_is_not_there_is_said_before_gradio_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="holds no Tokenizer"):
        serve(AppConfig(run_dir=str(tmp_path / "none")))


def test_it_listens_to_this_machine_alone_by_default() -> None:
    assert _is_loopback(AppConfig(run_dir="runs/mine").host)
    hosts = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "192.168.1.2", "example")
    assert [_is_loopback(host) for host in hosts] == [True] * 3 + [False] * 4


def test_every_response_forbids_the_browser_other_hosts() -> None:
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def receive() -> Any: ...

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(SameOriginOnly(application)({"type": "http"}, receive, send))
    assert sent[0]["headers"] == [(b"a", b"b"), (b"content-security-policy", POLICY.encode())]
    assert sent[1] == {"type": "http.response.body", "body": b"page"}
    assert "http" not in POLICY
    assert "*" not in POLICY
