"""Write and execute docs/example.ipynb.

    python scripts/make_notebook.py runs/quickstart     # a run of `make demo`

Needs nbclient and ipykernel. The notebook names the run `runs/quickstart`, wherever it lies.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

PROSE, CODE = "markdown", "code"
CELLS = [
    (
        PROSE,
        """# Explanations in a notebook

`make demo` trains the small transformer of this page in minutes on a CPU. Everything below works the same on a
Hugging Face folder, a `.ckpt` of a run, or a live model with its tokenizer. (Made by `scripts/make_notebook.py`.)""",
    ),
    (
        CODE,
        """from calig.pipeline import Explanation, explain, load_explanations

texts = ["although the soup was terrible , the waiter was not bad", "the hall was never good , and the light was nasty"]
explanations = explain("runs/quickstart", texts, curves=True)
explanations[0]""",
    ),
    (
        PROSE,
        """An explanation shows itself: blue supports the decision, orange opposes it; hover over a word for
its score. The bars are the share of the relevance in each block. It is also numbers:""",
    ),
    (
        CODE,
        """explanation = explanations[0]
print(explanation)
[(word.text, round(word.score, 2)) for word in explanation.top(3)]""",
    ),
    (PROSE, "Block by block, from the words (below) to the decision (above), and as lines, one per word:"),
    (CODE, "explanation.plot_layers(per_layer=True)"),
    (CODE, "explanation.plot_flow()"),
    (
        PROSE,
        """Is what is called relevant what the model depends on? The probability falls as those words are
masked; a random ranking and the reversed one are the controls.""",
    ),
    (CODE, "explanation.plot_curves()"),
    (PROSE, "Another class, another method:"),
    (
        CODE,
        """explain("runs/quickstart", texts[1:], target="positive", method="integrated_gradients")[0]""",
    ),
    (PROSE, "A run keeps the rows of its explain stage, with human rationales where the data has them (underlined):"),
    (
        CODE,
        """rows = load_explanations("runs/quickstart")
print(rows)
marked = next(row for row in rows if row["method"] == "ca_lig" and row["rationale"] and sum(row["rationale"]) > 1)
Explanation.from_row(marked, label_names=["negative", "positive"])""",
    ),
]


def notebook() -> dict:
    """The notebook without outputs."""
    import nbformat

    made = nbformat.v4.new_notebook()
    make = {PROSE: nbformat.v4.new_markdown_cell, CODE: nbformat.v4.new_code_cell}
    made.cells = [make[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(CELLS)]
    made.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return made


def main() -> None:
    """Execute the cells in a folder where `runs/quickstart` is the given run, and write the page."""
    import nbformat
    from nbclient import NotebookClient

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of the experiment quickstart")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "example.ipynb")
    options = parser.parse_args()
    made = notebook()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").mkdir()
        (Path(folder) / "runs" / "quickstart").symlink_to(options.run.resolve())
        NotebookClient(made, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times of this machine
        if "outputs" in cell:  # progress bars, and warnings about this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    made.metadata.pop("language_info", None)
    nbformat.write(made, options.out)
    print(f"{options.out} · {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
