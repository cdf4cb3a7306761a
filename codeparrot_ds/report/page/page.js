// Draws the charts whose data is in the element "charts". The page is complete without them: tables have the figures.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const plots = [];

  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

  const plain = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, "e");
    return size >= 1000 ? grouped.format(value) : String(Number(value.toPrecision(4)));
  };

  const bytes = (value) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    for (; Math.abs(value) >= 1000 && unit < units.length - 1; unit++) value /= 1000;
    return `${Number(value.toPrecision(4))} ${units[unit]}`;
  };

  const shown = (style, value) => {
    if (value == null) return "–";
    return style === "bytes" ? bytes(value) : style === "percent" ? `${plain(value)} %` : plain(value);
  };

  // The width of the longest label; see uPlot's demo "axis-autosize".
  const axisSize = (plot, values, index, cycle) => {
    const axis = plot.axes[index];
    if (cycle > 1) return axis._size;
    const longest = (values ?? []).reduce((a, b) => (b.length > a.length ? b : a), "");
    plot.ctx.font = axis.font[0];
    const width = longest ? plot.ctx.measureText(longest).width / devicePixelRatio : 0;
    return Math.ceil(axis.ticks.size + axis.gap + width);
  };

  const seriesOptions = (chart, series, smoothing) => {
    const second = series.run === 1;
    const strong = series.role === "points" && !second && chart.series.length > 1 ? "valid" : second ? "two" : "one";
    const faint = series.role === "faint" && smoothing;
    const alone = series.role === "points";
    return {
      label: series.label,
      stroke: color(faint ? `${strong}-faint` : strong),
      width: faint || alone ? 1 : series.role === "smooth" ? 2 : 1.5,
      dash: alone ? [4, 4] : undefined,
      show: series.role !== "smooth" || smoothing,
      points: { show: alone || series.x.length === 1, size: 6, fill: color("paper") },
      value: (plot, value) => shown(chart.style, value),
    };
  };

  // Of a line that is thinned, the nearest point; of evaluations, only the step itself.
  const nearest = (plot, number, index, role) => {
    const values = plot.data[number];
    if (role === undefined || role === "points") return index;
    for (let by = 0; by < values.length; by++) {
      if (values[index - by] !== undefined) return index - by;
      if (values[index + by] !== undefined) return index + by;
    }
    return index;
  };

  const height = (host) => (host.closest(".wide") ? (host.clientWidth < 500 ? 240 : 300) : 176);

  const draw = (host, chart, group) => {
    const old = plots.find((each) => each.host === host);
    const state = old ? old.state : { log: false, smoothing: true };
    const last = chart.series.filter((series) => series.x.length);
    const data = uPlot.join(last.map((series) => [series.x, series.y]));
    const axis = {
      stroke: color("muted"), font: `12px ${color("sans")}`, gap: 6,
      grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("line"), width: 1, size: 4 },
    };
    const options = {
      width: host.clientWidth, height: height(host),
      scales: { x: { time: false }, y: { distr: state.log ? 3 : 1 } },
      axes: [
        { ...axis, size: 30, space: 70, values: (plot, values) => values.map((value) => (value == null ? "" : grouped.format(value))), incrs: uPlot.incrs },
        { ...axis, size: axisSize, space: 36, values: (plot, values) => values.map((value) => (value == null ? "" : shown(chart.style, value))) },
      ],
      series: [
        { label: "step", value: (plot, value) => (value == null ? "–" : grouped.format(value)) },
        ...last.map((series) => seriesOptions(chart, series, state.smoothing)),
      ],
      cursor: {
        y: false, points: { size: 7, fill: (plot, index) => plot.series[index].stroke(plot, index) }, focus: { prox: -1 },
        sync: { key: group, setSeries: false, scales: ["x", null] },
        dataIdx: (plot, number, index) => nearest(plot, number, index, last[number - 1]?.role),
      },
      legend: { live: true, markers: { width: 0, fill: (plot, index) => plot.series[index].stroke(plot, index) } },
      padding: [8, Math.max(12, 3.5 * grouped.format(data[0].at(-1)).length), 0, 0], // half of the last label
      hooks: { setCursor: [(plot) => host.classList.toggle("idle", plot.cursor.idx == null)] },
    };
    if (old) {
      old.plot.destroy();
      plots.splice(plots.indexOf(old), 1);
    }
    host.classList.add("idle");
    plots.push({ host, chart, group, state, plot: new uPlot(options, data, host) });
  };

  const redraw = () => plots.slice().forEach(({ host, chart, group }) => draw(host, chart, group));

  const option = (name, checked, change) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "checkbox";
    input.checked = checked;
    input.addEventListener("change", () => change(input.checked));
    label.append(input, name);
    return label;
  };

  const addTools = (host, chart, group) => {
    const tools = document.createElement("span");
    tools.className = "tools";
    const set = (key) => (value) => {
      plots.find((each) => each.host === host).state[key] = value;
      draw(host, chart, group);
    };
    if (chart.series.some((series) => series.role === "smooth")) tools.append(option("smoothed", true, set("smoothing")));
    if (chart.series.every((series) => series.y.every((value) => value == null || value > 0))) {
      tools.append(option("logarithmic", false, set("log")));
    }
    host.closest("figure").querySelector("figcaption").append(tools);
  };

  // The arrow keys move the cursor of a chart that has the focus, and its values are read out.
  const addKeys = (host, chart) => {
    const live = document.createElement("div");
    live.className = "live";
    live.setAttribute("aria-live", "polite");
    host.after(live);
    host.addEventListener("keydown", (event) => {
      const { plot } = plots.find((each) => each.host === host);
      const steps = plot.data[0];
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const at = Math.min(Math.max((plot.cursor.idx ?? (by > 0 ? -1 : steps.length)) + by, 0), steps.length - 1);
      plot.setCursor({ left: plot.valToPos(steps[at], "x"), top: 1 }, true, true);
      const values = plot.series.slice(1).map((series, i) => [series, plot.data[i + 1][at]]);
      const known = values.filter(([series, value]) => series.show && value != null);
      live.textContent = `step ${steps[at]}: ${known.map(([series, value]) => `${series.label} ${shown(chart.style, value)}`).join(", ")}`;
    });
  };

  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const { plot } = plots.find((each) => each.host === target);
      if (target.clientWidth !== plot.width) plot.setSize({ width: target.clientWidth, height: height(target) });
    }
  });

  document.querySelectorAll("[data-group]").forEach((element, number) => {
    element.querySelectorAll("[data-chart]").forEach((host) => {
      const chart = charts[Number(host.dataset.chart)];
      draw(host, chart, `group ${number}`);
      if (chart.scales) addTools(host, chart, `group ${number}`);
      addKeys(host, chart);
      observer.observe(host);
    });
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { root.classList.add("light"); redraw(); });
  addEventListener("afterprint", () => { root.classList.remove("light"); redraw(); });
})();
