"""One line that says what is being measured; on a terminal only."""

from __future__ import annotations

from types import TracebackType


class Progress:
    """A bar over `total` parts, with what runs right now behind it; silent without tqdm or a terminal."""

    def __init__(self, total: int) -> None:
        self.title = ""
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=total, leave=False, disable=None, bar_format="{n_fmt}/{total_fmt} |{bar:20}| {desc}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(": ".join(filter(None, (self.title, what))))

    def done(self) -> None:
        """With one part; the line is empty then, for a table to be printed."""
        if self._bar is not None:
            self._bar.update()
            self._bar.clear()
