"""What the label X-ray leaves behind: nothing, however it ends."""

from __future__ import annotations

import pytest

from lorasmith.errors import Interrupted
from lorasmith.schemas.jobs import Event
from lorasmith.schemas.labels import LabelSpec
from lorasmith.services.data_labels import show_labels
from lorasmith.services.workbench import Workbench


def test_ctrl_c_leaves_no_folder(workbench: Workbench) -> None:
    def presses_ctrl_c(event: Event) -> None:
        if event.type == "started":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="stopped after 0 of 5 rows"):
        show_labels(workbench, LabelSpec(data="signatures", model="starter", n=5), presses_ctrl_c)
    assert list((workbench.home / "previews").iterdir()) == []
