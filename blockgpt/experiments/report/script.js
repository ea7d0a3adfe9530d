// The page of a report: values of the nearest evaluations, variants on and off, the theme, and live updates.
"use strict";
(() => {
  const root = document.documentElement, hidden = new Set();  // names of variants that are switched off
  let data = {variants: {}, colors: 1, charts: []};

  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const value = (x) => Math.abs(x) >= 1e-3 && Math.abs(x) < 1e4 ? x.toFixed(4) : x.toPrecision(4);
  const count = (x) => {
    for (const [unit, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(x) >= 0.99995 * unit) return Number((x / unit).toPrecision(4)) + suffix;
    return String(Number(x.toPrecision(4)));
  };
  const spent = {tokens: (x) => `${count(x)} tokens`, flops: (x) => `${x.toPrecision(4)} FLOPs`,
                 time: (x) => `${Number(x.toPrecision(4))} s`};

  // ---- variants on and off

  function showVariants() {
    for (const node of document.querySelectorAll("[data-v]"))
      node.classList.toggle("off", hidden.has(data.variants[node.dataset.v]));
    for (const button of document.querySelectorAll("[data-toggle]"))
      button.setAttribute("aria-pressed", String(!hidden.has(data.variants[button.dataset.toggle])));
    if (zoomed) drawRanges();
  }

  function toggle(index) {
    const name = data.variants[index];
    if (!hidden.delete(name)) hidden.add(name);
    showVariants();
  }

  // ---- the end of the runs, where curves lie near each other

  const chartAreas = () => [...document.querySelectorAll(".chart:not(.scatter) .area")];
  let zoomed = false;

  // The last half of a chart: [x range, y range of the visible curves].
  function lastHalf(chart) {
    const all = visible(chart).flatMap((one) => one.p), end = Math.max(...all.map((point) => point[0]));
    const late = all.filter((point) => point[0] >= end / 2);
    if (!late.length) return [chart.full.x, chart.full.y];
    const low = Math.min(...late.map((point) => point[2])), high = Math.max(...late.map((point) => point[3]));
    const space = 0.06 * (high - low) || 0.01 * Math.abs(high) || 1;
    return [[end / 2, 1.015 * end], [low - space, high + space]];
  }

  function ticks([low, high]) {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => power * factor >= 0.999 * raw);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++)
      found.push([i * step, Math.abs(high) >= 1e5 ? (i * step).toPrecision(3).replace(/\.?0*e\+/, "e")
                                                  : (i * step).toFixed(decimals)]);
    return found;
  }

  function drawRanges() {
    chartAreas().forEach((area, i) => {
      const chart = data.charts[i], svg = area.querySelector("svg"), labels = area.parentElement.children;
      if (!chart.full) chart.full = {x: chart.x, y: chart.y, labels: [...labels].map((node) => node.innerHTML)};
      const {x, y} = chart.full, box = svg.dataset.box;
      clear(area);
      [chart.x, chart.y] = zoomed ? lastHalf(chart) : [x, y];
      const left = (value) => box * (value - x[0]) / (x[1] - x[0]), top = (value) => box * (y[1] - value) / (y[1] - y[0]);
      svg.setAttribute("viewBox", [left(chart.x[0]), top(chart.y[1]), left(chart.x[1]) - left(chart.x[0]),
                                   top(chart.y[0]) - top(chart.y[1])].join(" "));
      svg.querySelectorAll(".zoomed").forEach((node) => node.remove());
      svg.querySelectorAll(".grid").forEach((node) => node.classList.toggle("off", zoomed));
      for (const [node, range, side] of [[labels[0], chart.y, "bottom"], [labels[2], chart.x, "left"]]) {
        if (!zoomed) {
          node.innerHTML = chart.full.labels[side === "left" ? 2 : 0];  // as the page had it
          continue;
        }
        node.replaceChildren(...ticks(range).map(([at, text]) => {
          const label = element("span", "", side === "left" && chart.spend === "tokens" ? count(at) : text);
          label.style[side] = `${100 * (at - range[0]) / (range[1] - range[0])}%`;
          return label;
        }));
        if (side === "bottom")
          for (const [at] of ticks(range)) {
            const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
            line.setAttribute("class", "grid zoomed");
            line.setAttribute("d", `M0,${top(at)}H${box}`);
            svg.prepend(line);
          }
      }
    });
  }

  function addZoom() {
    const legend = document.querySelector(".legend");
    if (!legend) return;
    const button = element("button", "zoom", "last half");
    button.type = "button";
    button.setAttribute("aria-pressed", String(zoomed));
    button.addEventListener("click", () => {
      zoomed = !zoomed;
      button.setAttribute("aria-pressed", String(zoomed));
      drawRanges();
    });
    legend.append(button);
  }

  // ---- values of the nearest evaluations

  function visible(chart) {
    return chart.series.filter((one) => one.p.length && !hidden.has(data.variants[one.v]));
  }

  function nearest(points, x) {
    return points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
  }

  function clear(area) {
    for (const node of area.querySelectorAll(".tip, .cursor, .point")) node.remove();
  }

  // Shows the values at an x; `height` (0 at the top) is where the pointer is, which chooses the bold one.
  function show(area, chart, x, height) {
    clear(area);
    const place = (point) => [(point[0] - chart.x[0]) / (chart.x[1] - chart.x[0]),
                              1 - (point[1] - chart.y[0]) / (chart.y[1] - chart.y[0])];
    const found = visible(chart).map((one) => ({v: one.v, point: nearest(one.p, x)}));
    if (!found.length) return;
    const distance = (one) => {
      const [left, top] = place(one.point), [at] = place([x, 0]);
      return Math.hypot((left - at) * area.clientWidth, height === null ? 0 : (top - height) * area.clientHeight);
    };
    const first = found.reduce((best, one) => distance(one) < distance(best) ? one : best);
    const rows = found.sort((a, b) => a.point[1] - b.point[1]);
    const listed = rows.length > 10 ? rows.filter((one) => distance(one) <= distance(first) + 40).slice(0, 10) : rows;
    const [left] = place(first.point), cursor = element("div", "cursor"), tip = element("div", "tip");
    cursor.style.left = `${100 * left}%`;
    tip.append(element("b", "", spent[chart.spend](first.point[0])));
    for (const one of listed) {
      const [, mean, low, high, n] = one.point, row = element("div", `v${one.v % data.colors}`);
      row.append(element("i"), element(one === first ? "b" : "span", "who", data.variants[one.v]),
                 element("span", "figure", value(mean) + (n > 1 && one === first ? ` [${value(low)}, ${value(high)}]` : "")));
      tip.append(row);
      const [x1, y1] = place(one.point), dot = element("div", `point v${one.v % data.colors}`);
      if (y1 >= 0 && y1 <= 1) {
        dot.style.left = `${100 * x1}%`;
        dot.style.top = `${100 * y1}%`;
        area.append(dot);
      }
    }
    if (left < 0.5) tip.style.right = "4px"; else tip.style.left = "4px";
    area.append(cursor, tip);
  }

  function connect(area, chart) {
    let at = 0;
    const follow = (event) => {
      const box = area.getBoundingClientRect(), left = (event.clientX - box.left) / box.width;
      show(area, chart, chart.x[0] + left * (chart.x[1] - chart.x[0]), (event.clientY - box.top) / box.height);
    };
    const step = (by) => {
      const xs = [...new Set(visible(chart).flatMap((one) => one.p.map((point) => point[0])))].sort((a, b) => a - b);
      if (!xs.length) return;
      at = Math.min(xs.length - 1, Math.max(0, at + by));
      show(area, chart, xs[at], null);
    };
    area.addEventListener("pointermove", follow);
    area.addEventListener("pointerdown", follow);
    area.addEventListener("pointerleave", () => clear(area));
    area.addEventListener("blur", () => clear(area));
    area.addEventListener("keydown", (event) => {
      const by = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9}[event.key];
      if (by === undefined) return;
      event.preventDefault();
      step(by);
    });
  }

  function start() {
    data = JSON.parse(document.getElementById("data").textContent);
    chartAreas().forEach((area, i) => connect(area, data.charts[i]));
    addZoom();
    for (const button of document.querySelectorAll("[data-toggle]"))
      button.addEventListener("click", () => toggle(button.dataset.toggle));
    showVariants();
  }

  // ---- theme, print

  const themes = ["auto", "light", "dark"], themeButton = document.getElementById("theme");
  themeButton.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    themeButton.textContent = `theme: ${next}`;
  });
  let unfolded = [];
  window.addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details:not([open])")];
    unfolded.forEach((node) => node.setAttribute("open", ""));
  });
  window.addEventListener("afterprint", () => unfolded.forEach((node) => node.removeAttribute("open")));

  // ---- live: ask for the version of the page, and replace its content when it is another one

  const POLL_MS = 2000;
  let version = document.body.dataset.live;

  async function text(path) {
    const response = await fetch(path, {cache: "no-store"});
    if (!response.ok) throw new Error(response.statusText);
    return response.text();
  }

  function replaceContent(html) {
    const next = new DOMParser().parseFromString(html, "text/html"), main = document.querySelector("main");
    const summaries = (node) => [...node.querySelectorAll("details")];
    const name = (node) => `${node.closest("section").id} ${node.querySelector("summary").textContent.replace(/\d+/g, "")}`;
    const open = new Map(summaries(main).map((node) => [name(node), node.open]));
    const scrolled = [...main.querySelectorAll(".scroll, pre")].map((node) => node.scrollLeft);
    const focused = document.activeElement && document.activeElement.dataset.toggle, top = window.scrollY;
    for (const node of summaries(next))
      if (open.has(name(node))) node.open = open.get(name(node));
    main.replaceChildren(...next.querySelector("main").childNodes);
    main.querySelectorAll(".scroll, pre").forEach((node, i) => { node.scrollLeft = scrolled[i] || 0; });
    start();
    if (focused !== undefined && focused !== null) {
      const button = document.querySelector(`[data-toggle="${focused}"]`);
      if (button) button.focus({preventScroll: true});
    }
    window.scrollTo({top, behavior: "instant"});
  }

  async function poll() {
    const mark = () => document.getElementById("live");
    try {
      const now = await text("/version");
      if (now !== version) replaceContent(await text("/"));
      version = now;
      mark().textContent = "live";
      mark().classList.remove("lost");
    } catch (error) {
      mark().textContent = "no connection to tools.watch: the page is as of then";
      mark().classList.add("lost");
    }
    setTimeout(poll, POLL_MS);
  }

  start();
  if ("live" in document.body.dataset) poll();
})();
