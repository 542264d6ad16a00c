"""Uploads become datasets one after another in a thread of the server; a restarted server goes on where it was."""

from __future__ import annotations

import logging
import queue
import threading
import time

from lorasmith.errors import Interrupted
from lorasmith.schemas.uploads import Upload
from lorasmith.services.uploads import PASSES, find_upload, import_upload, left_to_import, remove_stale_uploads
from lorasmith.services.workbench import Workbench

STOP_S = 30.0  # that the import gets to write down where it is
AGAIN_S = 30.0  # until an import is tried again that a full disk or another process held up

log = logging.getLogger(__name__)


class Importer:
    """`begin` takes up what an earlier server left; `stop` leaves the import under way for the next one."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.later: dict[str, float] = {}  # when to try again what was held up
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.work, name="imports", daemon=True)

    def begin(self) -> None:
        remove_stale_uploads(self.workbench)
        for upload in left_to_import(self.workbench):
            self.add(upload.id)
        self.thread.start()

    def add(self, upload_id: str) -> None:
        self.waiting.put(upload_id)

    def stop(self) -> None:
        self.stopping.set()
        self.waiting.put(None)
        self.thread.join(STOP_S)

    def work(self) -> None:
        while (upload_id := self.next()) is not None and not self.stopping.is_set():
            try:
                upload = find_upload(self.workbench, upload_id)
                if upload is not None:
                    self.import_or_wait(upload)
            except Interrupted:
                return
            except Exception:
                log.exception("the import of %s failed", upload_id)  # the upload says that it did

    def import_or_wait(self, upload: Upload) -> None:
        try:
            import_upload(self.workbench, upload, self.stopping.is_set)
        except PASSES as error:
            log.warning("the import of %s is tried again in %.0f s: %s", upload.id, AGAIN_S, error.message)
            self.later[upload.id] = time.monotonic() + AGAIN_S

    def next(self) -> str | None:
        """One whose time has come again, or else the next one that is added; None when the server stops."""
        while True:
            now = time.monotonic()
            due = [upload_id for upload_id, at in self.later.items() if at <= now]
            if due:
                del self.later[due[0]]
                return due[0]
            try:
                return self.waiting.get(timeout=min(self.later.values()) - now if self.later else None)
            except queue.Empty:
                continue
