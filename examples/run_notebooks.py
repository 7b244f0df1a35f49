"""Run the notebooks and store what they show, without the cells that need the hub or a GPU.

python examples/run_notebooks.py notebooks/*.ipynb     (after `make demo`, or with PIGGYBACK_LENS_ADAPTER)
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    notebook, began = nbformat.read(path, as_version=4), time.monotonic()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    place = {"metadata": {"path": str(path.resolve().parent)}}
    NotebookClient(
        notebook, timeout=3600, skip_cells_with_tag="network", resources=place, record_timing=False
    ).execute()
    nbformat.write(notebook, path)
    print(f"{path}: {time.monotonic() - began:.0f} seconds, {path.stat().st_size / 1e3:.0f} kB")
