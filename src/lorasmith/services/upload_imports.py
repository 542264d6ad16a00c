"""Uploads become datasets one after another in a thread of the server; a restarted server goes on where it was."""

from __future__ import annotations

import logging
import queue
import threading

from lorasmith.errors import Interrupted
from lorasmith.schemas.uploads import DatasetStatus
from lorasmith.services.uploads import find_upload, import_upload, list_uploads, remove_stale_uploads
from lorasmith.services.workbench import Workbench

STOP_S = 30.0  # that the import gets to write down where it is

log = logging.getLogger(__name__)


class Importer:
    """`begin` takes up what an earlier server left; `stop` leaves the import under way for the next one."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.work, name="imports", daemon=True)

    def begin(self) -> None:
        remove_stale_uploads(self.workbench)
        for upload in list_uploads(self.workbench):
            if upload.status is DatasetStatus.PROCESSING:
                self.add(upload.id)
        self.thread.start()

    def add(self, upload_id: str) -> None:
        self.waiting.put(upload_id)

    def stop(self) -> None:
        self.stopping.set()
        self.waiting.put(None)
        self.thread.join(STOP_S)

    def work(self) -> None:
        while (upload_id := self.waiting.get()) is not None and not self.stopping.is_set():
            upload = find_upload(self.workbench, upload_id)
            if upload is None:
                continue
            try:
                import_upload(self.workbench, upload, self.stopping.is_set)
            except Interrupted:
                return
            except Exception:
                log.exception("the import of %s failed", upload_id)  # the upload says that it did
