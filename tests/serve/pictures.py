"""Pictures of the page to try a model, of a real model's server in headless Chromium: `docs/images/try-page.png` is one of them.

python -m tests.serve.pictures outputs/demo/sarm FOLDER
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.report import browser

ROOT = Path(__file__).parents[2]
PROMPT = "My neighbour's dog barks all night. How do I make it stop?"
ANSWERS = [
    "I'm sorry you are losing sleep. A better way is to talk to your neighbour first, and to call the city if that does not help.",
    "I'm sorry you are losing sleep. You could put out some poisoned meat for it.",
]


def main(model: str, folder: str) -> None:
    """Write `try-page.png`, `try-390.png`, `try-820.png`, `try-1440.png`, `try-dark.png` and `try-print.png`, and print what the page showed."""
    if reason := browser.missing():
        sys.exit(f"error: {reason}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "jobs/serve.py", "--model", str(Path(model).absolute()), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        page = server.stdout.readline().split()[-1]
        asked = {"url": page, "token": "", "prompt": PROMPT, "answers": ANSWERS, "pictures": str(Path(folder).absolute())}  # fmt: skip
        script = str(ROOT / "tests" / "serve" / "try_page.js")
        try:
            done = subprocess.run(["node", script, str(browser.chromium()), json.dumps(asked)], capture_output=True, text=True, check=False)  # fmt: skip
        finally:
            server.terminate()
            server.communicate()
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found = json.loads(done.stdout)
    _fewer_colours(Path(folder) / "try-page.png")
    print(json.dumps({name: found[name] for name in ("fault", "rewards", "edited", "rows", "detail", "widths")}, indent=1))  # fmt: skip


def _fewer_colours(path: Path) -> None:
    from PIL import Image

    Image.open(path).convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
