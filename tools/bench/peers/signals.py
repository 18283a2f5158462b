"""datatrove's four quality filters, run by tools/bench/signals.py with the interpreter of their own
environment (requirements/bench.txt): `python signals.py TEXTS.json RESULT.json`.

Filters have the settings of datatrove's FineWeb example, where they differ from the defaults. Imports and the
first document, which loads the tokenizer, are not measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Measure each filter on all texts."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    texts = json.loads(Path(sys.argv[1]).read_text())
    filters = {
        "Gopher repetition": GopherRepetitionFilter(),
        "Gopher quality": GopherQualityFilter(),
        "C4": C4QualityFilter(filter_no_terminal_punct=False),
        "FineWeb": FineWebQualityFilter(),
    }
    seconds = {}
    for name, instance in filters.items():
        instance.filter(Document(text=texts[0], id="0"))
        start = time.process_time()
        for number, text in enumerate(texts):
            instance.filter(Document(text=text, id=str(number)))
        seconds[name] = time.process_time() - start
    result = {"version": importlib.metadata.version("datatrove"), "cpu_s": seconds}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
