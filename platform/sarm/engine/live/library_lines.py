"""Lines in which libraries warn, kept out of the way of a live display: they go to a file, which is named at the end."""

import re
from pathlib import Path

from sarm.engine.live.progress_line import bare

# Errors are none of these: they stay on the screen.
_WARNING = re.compile(
    # Ray, and every other library that has Python's usual format; MLflow; DeepSpeed.
    r"\[?\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d(?:[.,]\d+)?\]?\s+\[?(?:INFO|WARNING)\b"
    # Compiled parts of Ray and of torch.
    r"|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [IW] "
    r"|(?:\[rank\d+\]:)?\[?W\d{4} \d\d:\d\d:\d\d"
    r"|(?P<python>\S*site-packages/\S+:\d+: \w*Warning: )"
)


class LibraryLines:
    """Takes lines of warnings, writes them to `path` and counts them. The file is made by the first of them, and holds those of one job."""

    def __init__(self, path: Path):
        self._path, self.num = path, 0
        # Python shows the line of code behind its warning.
        self._is_code_next = False

    def takes(self, line: str) -> bool:
        """Whether the line is a library's warning, which the file has now; False as well where the file cannot be written."""
        said = bare(line)
        is_code, self._is_code_next = self._is_code_next and said.startswith("  "), False
        match = None if is_code else _WARNING.match(said)
        if not is_code and match is None:
            return False
        self._is_code_next = match is not None and match["python"] is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a" if self.num else "w") as file:
                file.write(f"{said}\n")
        except OSError:
            return False
        self.num += match is not None
        return True

    def told(self) -> str:
        """How many there were, and where they are; '' if there were none."""
        what = "warning" if self.num == 1 else "warnings"
        return f"{self.num:,} {what} of libraries: {self._path}" if self.num else ""
