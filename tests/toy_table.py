"""Train and test every policy on the toy set with several seeds, and print the table of RESULTS.md. Run by hand.

It runs the same commands as a user, prints each, and keeps the results under --out, so that the same command resumes an
interrupted run. Delete that folder after changing the code or the data.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BACKBONE = ["--weights", "none", "--arch", "resnet18", "--patch_size", "32", "--lr", "5e-4", "--epochs", "10"]
CLASSIFIER = ["--k", "1", "--start_size", "1", "--rnn_hidden", "256", "--lr", "1e-3"]
FAITHFUL = ["--lr_schedule", "constant", "--attention_lr", "1e-3", "--supervision", "last"]
ROWS = {
    "learned": [],
    "learned, 2 glimpses": ["--n_glimpses", "2"],
    "learned, faithful settings": FAITHFUL,
    "learned, faithful settings, 2 glimpses": [*FAITHFUL, "--n_glimpses", "2"],
    "learned, before training": ["--epochs", "0"],
    "learned, 2 glimpses, before training": ["--epochs", "0", "--n_glimpses", "2"],
    "center": ["--policy", "center"],
    "random": ["--policy", "random"],
}
COLUMNS = {
    "deterministic": "policy deterministic accuracy",
    "sampled trajectory": "policy sampled trajectory accuracy",
    "average of 7": "policy average of 7 accuracy",
    "hit rate, 1st glimpse": "glimpse 1 deterministic hit_rate",
    "2nd glimpse": "glimpse 2 deterministic hit_rate",
    "1st, sampled": "glimpse 1 sampled trajectory hit_rate",
    "2nd, sampled": "glimpse 2 sampled trajectory hit_rate",
}


def run(script: str, flags: list[str]) -> None:
    """Run a script of the repository."""
    print(f"$ python {script} {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, ROOT / script, *flags], check=True, stdout=subprocess.DEVNULL)


def read_figures(path: Path) -> dict[str, float]:
    """The figures in a file of results, by "policy <estimate> <name>" and "glimpse <t> <estimate> <name>"."""
    figures = {}
    for subject, of_subject in json.loads(path.read_text(encoding="utf-8"))["figures"].items():
        start = subject if subject.startswith("glimpse") else "policy"
        for estimate, values in of_subject.items():
            figures |= {f"{start} {estimate} {name}": value for name, value in values.items()}
    return figures


def measure(data_dir: Path, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Train and test all rows with a seed, but for those that are done. Returns the figures of each."""
    folder = out / f"seed_{seed}"
    data = ["--data_dir", str(data_dir), "--batch_size", "32", "--precision", "fp32"]
    training = [*data, "--seed", str(seed), "--overwrite"]  # what an interrupted run left
    if not (folder / "done").exists():
        run("pretrain.py", [*training, "--save_dir", str(folder), *BACKBONE])
        (folder / "done").touch()
    figures = {}
    for row, flags in ROWS.items():
        save_dir = folder / row.replace(",", "").replace(" ", "_")
        if not [*save_dir.glob("results_*.json")]:
            place, backbone = ["--save_dir", str(save_dir)], ["--backbone", str(folder / "pt_glimpse_model.tar")]
            run("main.py", [*training, *place, *backbone, *CLASSIFIER, "--epochs", "12", *flags])
            run("main.py", [*data, *place, "--task=test", "--seed", str(seed)])
        [results] = save_dir.glob("results_*.json")
        figures[row] = read_figures(results)
    return figures


def main(argv: list[str] | None = None) -> None:
    """Measure all seeds and print means and standard deviations as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data_dir", type=Path, default=ROOT / "data/toy", help="images of data/toy_dogs.py (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data/toy/table", help="folder for checkpoints (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    args = parser.parse_args(argv)
    seeds = [measure(args.data_dir, args.out, seed) for seed in args.seeds]
    print(f"\n| in % | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row in ROWS:
        cells = []
        for name in COLUMNS.values():
            values = [100 * figures[row][name] for figures in seeds if name in figures[row]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
