"""`lorasmith serve` and `lorasmith api-token`"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import hint, print_json
from lorasmith.settings import DEFAULT_PORT, ServerSettings


def serve(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's own needs a password")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"Port; without it {DEFAULT_PORT} or the next free one")
    ] = None,
    password_stdin: Annotated[
        bool,
        typer.Option(
            "--password-stdin", help="Read the password of logins from standard input; or set LORASMITH_PASSWORD"
        ),
    ] = False,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Run queued jobs too")] = True,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores that its jobs may use; without it, all")] = None,
    root_path: Annotated[str, typer.Option(help="Path below which a proxy shows this server, such as /lorasmith")] = "",
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM), to speak HTTPS; needs --tls-key")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON")] = False,
) -> None:
    """Serve the REST API of this home folder and run its jobs until Ctrl-C; what trains then goes on"""
    password = sys.stdin.readline().rstrip("\r\n") if password_stdin else None
    budget = (cores or os.cpu_count() or 1) if worker else None
    settings = ServerSettings.read(
        host,
        DEFAULT_PORT if port is None else port,
        password,
        worker_cores=budget,
        root_path=root_path,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    workbench = open_workbench(context)
    from lorasmith.api.server import serve as serve_until_stopped
    from lorasmith.services.access import api_token, token_file

    api_token(workbench.home)

    def listening(url: str) -> None:
        token = token_file(workbench.home)
        if as_json:
            print_json({"url": url, "token_file": str(token)})
        else:
            print(url)
        sys.stdout.flush()
        hint(f"home {workbench.home}\ntoken {token}; lorasmith api-token prints it")
        if not settings.is_loopback and tls_cert is None:
            hint(
                "open to other machines, unencrypted: give it --tls-cert and --tls-key, or put a proxy with TLS before it"
            )

    serve_until_stopped(workbench, settings, next_port=port is None, listening=listening)
    hint("stopped")


def show_token(
    context: typer.Context,
    rotate: Annotated[bool, typer.Option("--rotate", help="Make a new one; the old one ends at once")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Print the token of the REST API"""
    from lorasmith.services.access import api_token, rotate_token, token_file

    home = open_workbench(context).home
    token = rotate_token(home) if rotate else api_token(home)
    if as_json:
        print_json({"token": token, "token_file": str(token_file(home))})
    else:
        print(token)
