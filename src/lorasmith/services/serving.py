"""One prompt or a conversation with a model or adapter, in an engine process that streams its answer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

from lorasmith.errors import InvalidSpec
from lorasmith.files import new_id
from lorasmith.jobs.folder import write_order
from lorasmith.jobs.processes import start_conversation
from lorasmith.jobs.runner import outcome
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.serving import GenerationInputs, GenerationSpec
from lorasmith.services.adapters import adapter_folder, verify_adapter
from lorasmith.services.models import resolve_model
from lorasmith.services.workbench import Workbench


class Conversation:
    """An engine process that keeps the model resident; `ask` streams the pieces of each answer."""

    def __init__(self, workbench: Workbench, spec: GenerationSpec) -> None:
        if (spec.adapter is None) == (spec.model is None):
            raise InvalidSpec("give either an adapter or a model to talk to")
        if spec.adapter:
            adapter = verify_adapter(workbench, spec.adapter)
            inputs = GenerationInputs(
                model_name=adapter.base_model,
                model_folder=adapter.base_folder,
                adapter_folder=str(adapter_folder(workbench, adapter)),
            )
        else:
            model = resolve_model(workbench, spec.model or "")
            inputs = GenerationInputs(model_name=model.name, model_folder=model.location)
        job_id = new_id("job")
        self.folder = workbench.path(f"conversations/{job_id}")
        order = JobOrder(id=job_id, kind=JobKind.GENERATION, spec=spec.model_dump(), inputs=inputs.model_dump())
        write_order(self.folder, order)
        self.process: subprocess.Popen[bytes] = start_conversation(self.folder)

    def ask(self, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield `{"text": piece}` while the answer grows and last `{"result": …}`. Raises what the engine raised."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"messages": messages}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the engine has ended; its error is read below
        for line in self.process.stdout:
            reply: dict[str, Any] = json.loads(line)
            yield reply
            if "result" in reply:
                return
        self.process.wait()
        outcome(self.folder, self.process.returncode)

    def close(self) -> None:
        """End the engine; raises its error if it had one."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)
