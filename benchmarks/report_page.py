"""Compare plotting libraries for the page of a run: size, and CPU time until 8 curves of 20,000 steps are drawn.

    python benchmarks/report_page.py [--repeat 9] [--work DIRECTORY]

Needs npm, chromium and chromium-driver, and selenium (`pip install selenium`). Each page holds its library and the same
data, and draws each curve in a chart of its own, 400 x 180 pixels, without animation. Pages are loaded in turn, each
`--repeat` times after once to warm up; times are medians.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import psutil

STEPS, CURVES = 20_000, 8
# Name: package on npm, file in it.
LIBRARIES = {
    "uPlot": ("uplot@1.6.32", "dist/uPlot.iife.min.js"),
    "Chart.js": ("chart.js@4.6.1", "dist/chart.umd.min.js"),
    "Plotly (basic)": ("plotly.js-basic-dist-min@4.1.1", "plotly-basic.min.js"),
    "ECharts": ("echarts@6.1.0", "dist/echarts.min.js"),
}
DRAW = {
    "uPlot": """new uPlot({width: 400, height: 180, scales: {x: {time: false}},
        series: [{}, {stroke: '#1f5fbf'}]}, [x, y], host)""",
    "Chart.js": """const canvas = host.appendChild(document.createElement('canvas'));
        new Chart(canvas, {type: 'line', data: {datasets: [{data: x.map((v, i) => ({x: v, y: y[i]})),
        borderColor: '#1f5fbf', borderWidth: 1, pointRadius: 0}]}, options: {animation: false, parsing: false,
        normalized: true, responsive: false, scales: {x: {type: 'linear'}}, plugins: {legend: {display: false},
        decimation: {enabled: false}}}})""",
    "Plotly (basic)": """Plotly.newPlot(host, [{x, y, mode: 'lines', line: {color: '#1f5fbf', width: 1}}],
        {width: 400, height: 180, margin: {l: 40, r: 10, t: 10, b: 30}}, {displayModeBar: false})""",
    "ECharts": """host.style.cssText = 'width:400px;height:180px';
        echarts.init(host).setOption({animation: false, xAxis: {type: 'value'}, yAxis: {type: 'value', scale: true},
        series: [{type: 'line', showSymbol: false, data: x.map((v, i) => [v, y[i]]), lineStyle: {width: 1}}]})""",
}


def fetch(package: str, file: str, work: Path) -> str:
    """A file of a package on npm."""
    packed = subprocess.run(
        ["npm", "pack", package, "--silent"], cwd=work, check=True, capture_output=True, encoding="utf-8"
    )
    with tarfile.open(work / packed.stdout.strip()) as archive:
        member = archive.extractfile(f"package/{file}")
        assert member is not None
        return member.read().decode()


def page(library: str, script: str) -> str:
    """A page with a library, data and charts; `window.drawn` is set two frames after the last is drawn."""
    x = list(range(STEPS))
    curves = [[round(9 * math.exp(-i / 4000) + math.sin(i * (1.3 + c)), 5) for i in x] for c in range(CURVES)]
    data = json.dumps({"x": x, "curves": curves}, separators=(",", ":"))
    return f"""<!doctype html><meta charset="utf-8"><body><script>{script}</script>
<script type="application/json" id="data">{data}</script><script>
const {{x, curves}} = JSON.parse(document.getElementById('data').textContent);
for (const y of curves) {{
  const host = document.body.appendChild(document.createElement('div'));
  {DRAW[library]};
}}
requestAnimationFrame(() => requestAnimationFrame(() => {{ window.drawn = performance.now(); }}));
</script>"""


def start() -> Any:
    """A headless browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def cpu_seconds() -> float:
    """CPU time of the browser so far."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def load(driver: Any, path: Path) -> tuple[float, float]:
    """CPU seconds of the browser, and seconds until the page was drawn."""
    driver.get("about:blank")
    before = cpu_seconds()
    driver.get(path.as_uri())
    drawn = driver.execute_async_script(
        "const done = arguments[0]; (function wait() { window.drawn ? done(window.drawn) : setTimeout(wait, 5); })()"
    )
    return cpu_seconds() - before, drawn / 1000


def main() -> None:
    """Measure, and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9, help="loads of each page")
    parser.add_argument("--work", type=Path, default=None, help="directory for packages and pages")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for library, (package, file) in LIBRARIES.items():
        script = fetch(package, file, work)
        (work / f"{package}.html").write_text(page(library, script), encoding="utf-8")
        compressed = len(zlib.compress(script.encode(), 9))
        results[library] = {"package": package, "bytes": len(script.encode()), "compressed": compressed, "loads": []}
    driver = start()
    try:
        for number in range(options.repeat + 1):
            for each in results.values():
                measured = load(driver, work / f"{each['package']}.html")
                if number:  # the first warms up
                    each["loads"].append(measured)
    finally:
        driver.quit()
    print(f"{'':16}{'package':34}{'kB':>8}{'zlib kB':>9}{'CPU s':>8}{'drawn s':>9}")
    for library, each in results.items():
        cpu, drawn = (statistics.median(column) for column in zip(*each["loads"], strict=True))
        each |= {"cpu_seconds": cpu, "drawn_seconds": drawn}
        size, compressed = each["bytes"] / 1000, each["compressed"] / 1000
        print(f"{library:16}{each['package']:34}{size:>8.0f}{compressed:>9.0f}{cpu:>8.2f}{drawn:>9.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
