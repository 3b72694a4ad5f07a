"""A page to play with a run in a browser: `python -m pipelines.app RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("app")

import importlib.util
import ipaddress
import logging
import os
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipelines.command import announce, run_command
from pipelines.generation import ImageGenerationPipeline
from pipelines.hub import find_folder
from pipelines.options import parse_options
from pipelines.page_configs import AppConfig
from pipelines.playground import Playground
from pipelines.processes import new_accelerator
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer.storage.errors import InputError
from tokenizer.storage.weight_files import has_weights

logger = logging.getLogger(__name__)

# Before Gradio is imported, which reads them then.
NOTHING_LEAVES = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_SSR_MODE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; media-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""The browser asks no other host than ours for anything, whatever Gradio's page wants."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class SameOriginOnly:
    """Adds `POLICY` to every response."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Of an ASGI application."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def serve(config: AppConfig) -> None:
    """Shows the page until it is stopped.

    Raises:
        InputError: Gradio is not installed, the run has no tokenizer, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the page needs Gradio: pip install -e ".[app]" in the clone')
    playground = load_playground(config.run_dir, new_accelerator().device, config.text_encoder)
    with TemporaryDirectory(prefix="hqvae-app-") as folder:  # of the pictures that are shown
        os.environ.update(NOTHING_LEAVES, GRADIO_TEMP_DIR=folder)
        from starlette.middleware import Middleware

        from pipelines.page import STYLE, THEME, build_page

        page = build_page(playground, Path(config.run_dir).resolve().name)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        try:
            _, address, _ = page.launch(
                server_name=config.host,
                server_port=config.port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
                theme=THEME,
                css=STYLE,
                app_kwargs={"middleware": [Middleware(SameOriginOnly)]},
            )
        except OSError as error:
            wanted = "one of 7860 to 7959" if config.port is None else config.port
            raise InputError(
                f"port must be free on {config.host}, got {wanted}: {str(error).splitlines()[0]}"
            ) from error
        try:
            if not _is_loopback(config.host):
                logger.warning(
                    "without a password, for everyone who reaches %s of this machine", config.host
                )
            announce(f"open {address} (Ctrl-C ends)")
            threading.Event().wait()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped") from None
        finally:
            # Requests that are cut off by the end are not errors of the page.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            page.close(verbose=False)


def load_playground(
    source: str, device: torch.device, text_encoder: Path | None = None
) -> Playground:
    """That of a run, finished or under way, of a saved pipeline or tokenizer, or of the hub's.

    `text_encoder` is where the encoder of texts has been moved.

    Raises:
        InputError: there is no tokenizer, or a model is damaged.
    """
    folder = find_folder(source, ("tokenizer", "prior"))
    configs = [folder / "prior" / name for name in ("config.json", "model/config.json")]
    has_prior = configs[1].is_file() or (configs[0].is_file() and _is_model(folder / "prior"))
    if not has_prior:
        return Playground(TokenizerPipeline.from_pretrained(folder, device=device))
    pipeline = ImageGenerationPipeline.from_pretrained(
        folder, text_encoder=text_encoder, device=device
    )
    return Playground(pipeline)


def _is_model(folder: Path) -> bool:
    """A run that is under way has a config.json of its own there, and no weights yet."""
    return has_weights(folder)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _run() -> None:
    serve(parse_options(AppConfig, "pipelines.app"))


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()
