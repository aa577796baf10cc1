"""MMEdit's two forms, E-VQA and E-IC, over the simulated world: `mmedit-yearly`, `mmedit-caption-yearly`."""

from __future__ import annotations

from streams.base import BadStream, StreamConfig
from streams.world import WorldStream
from testbed.registry import STREAMS


def _no_files(config: StreamConfig, name: str) -> None:
    if config.data_root is not None:
        raise BadStream(
            f"{name} reads only the simulated world so far, got data_root {config.data_root}: leave --data-root out, "
            "or use okedit-yearly for questions about real photos"
        )


@STREAMS.register("mmedit-yearly")
class MMEditYearly(WorldStream):
    """E-VQA form: a picture, a question, an answer."""

    summary = "MMEdit E-VQA form over the simulated world: edits by picture and question. No files needed."
    form = "vqa"

    def __init__(self, config: StreamConfig) -> None:
        _no_files(config, self.name)
        super().__init__(config)


@STREAMS.register("mmedit-caption-yearly")
class MMEditCaptionYearly(WorldStream):
    """E-IC form: a picture, a fixed instruction, a caption that names who is in charge."""

    summary = "MMEdit E-IC form over the simulated world: captions that change with the facts. No files needed."
    form = "caption"

    def __init__(self, config: StreamConfig) -> None:
        _no_files(config, self.name)
        super().__init__(config)
