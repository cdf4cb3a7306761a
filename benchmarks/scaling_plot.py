"""Plot the projection of benchmarks/scaling.py from its JSON on stdin. Usage: python scaling_plot.py FILE.svg"""

import json
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "codeparrot-ds"  # the same figures produce the same bytes
import matplotlib.pyplot as plt  # noqa: E402

rows = json.load(sys.stdin)["projected"]
stages = sorted({row["stage"] for row in rows})
figure, axes = plt.subplots(1, len(stages), figsize=(10, 3.5), sharey=True, layout="constrained")
for stage, axis in zip(stages, axes, strict=True):
    for number, gbits in enumerate(sorted({row["host_gbits"] for row in rows})):
        of_link = [row for row in rows if (row["stage"], row["host_gbits"]) == (stage, gbits)]
        gpus = [row["gpus"] for row in of_link]
        low, high = zip(*(row["efficiency"] for row in of_link), strict=True)
        axis.fill_between(gpus, low, high, alpha=0.15, color=f"C{number}", linewidth=0)
        axis.plot(gpus, low, color=f"C{number}", marker=".", label=f"{gbits} Gb/s per host")
    axis.set(xscale="log", title=f"ZeRO-{stage}", xlabel="GPUs (8 per host)", ylim=(0, 1.02))
    axis.set_xticks(gpus, map(str, gpus), minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
axes[0].set_ylabel("fraction of a step spent computing")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
figure.savefig(sys.argv[1], metadata={"Date": None})
