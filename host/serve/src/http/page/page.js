"use strict";
// The token is in the fragment of the address, which is not sent to servers or logs. It stays in this tab.
if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
const COLOURS = ["#2f6fed", "#d9730d", "#16794c", "#a23ab8", "#b3261e", "#0b7a8a"];
const byId = (id) => document.getElementById(id);
const fixed = (number, digits) => (number === null || number === undefined ? "–" : number.toFixed(digits));
const whole = (number) => (number ?? 0).toLocaleString("en");

function ago(ms, now) {
  if (!ms) return "–";
  const s = Math.max(0, (now - ms) / 1000);
  if (s < 120) return `${s.toFixed(0)} s ago`;
  return s < 7200 ? `${(s / 60).toFixed(0)} min ago` : new Date(ms).toISOString().slice(0, 16).replace("T", " ");
}

function span(ms) {
  if (ms === null || ms === undefined) return "–";
  return ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : ms < 120000 ? `${(ms / 1000).toFixed(1)} s` : `${(ms / 60000).toFixed(0)} min`;
}

/** A table. Cells are text, so names from plugins or schemas cannot become markup. */
function table(into, heads, rows, nothing) {
  const element = document.createElement(rows.length ? "table" : "p");
  if (!rows.length) {
    element.textContent = nothing;
    element.className = "soft";
  } else {
    const line = (cells, kind) => {
      const tr = document.createElement("tr");
      for (const cell of cells) {
        const td = document.createElement(kind);
        const [text, style] = Array.isArray(cell) ? cell : [cell, ""];
        td.textContent = text;
        td.className = style;
        tr.append(td);
      }
      return tr;
    };
    element.append(line(heads, "th"), ...rows.map((row) => line(row, "td")));
  }
  byId(into).replaceChildren(element);
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** One chart per surface and task, one line per arm; an arm has the same colour everywhere. */
function chart(title, arms, colour) {
  const points = arms.flatMap((arm) => arm.series);
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  figure.append(caption);
  const [width, height, pad] = [300, 110, 6];
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
  const xs = points.map((point) => point[0]), ys = points.map((point) => point[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const x = (value) => pad + ((value - x0) / (x1 - x0 || 1)) * (width - 2 * pad);
  const y = (value) => height - pad - ((value - y0) / (y1 - y0 || 1)) * (height - 2 * pad);
  arms.forEach((arm) => {
    const line = arm.series.map(([time, ne]) => `${x(time).toFixed(1)},${y(ne).toFixed(1)}`).join(" ");
    drawing.append(svg("polyline", { points: line, fill: "none", stroke: colour(arm.arm), "stroke-width": 1.6, "vector-effect": "non-scaling-stroke" }));
  });
  caption.append(`${title} `);
  arms.forEach((arm) => {
    const label = document.createElement("b");
    label.style.color = colour(arm.arm);
    label.textContent = `${arm.arm || "all"} ${fixed(arm.ne, 4)} `;
    caption.append(label);
  });
  caption.append(`(${fixed(y0, 3)} to ${fixed(y1, 3)})`);
  figure.append(drawing);
  return figure;
}

function charts(ne) {
  const groups = new Map();
  const names = [...new Set(ne.map((row) => row.arm))].sort();
  const colour = (arm) => COLOURS[names.indexOf(arm) % COLOURS.length];
  for (const row of ne) {
    const drawn = { ...row, series: row.series.filter((point) => point[1] !== null) };
    if (drawn.series.length < 2) continue;
    const title = `${row.surface} · ${row.task}`;
    groups.set(title, [...(groups.get(title) ?? []), drawn]);
  }
  byId("charts").replaceChildren(...[...groups].slice(0, 24).map(([title, arms]) => chart(title, arms, colour)));
}

function show(live) {
  const now = live.now_ms, requests = live.requests;
  const up = span(now - live.started_ms);
  byId("summary").textContent = `${live.tier} · up ${up} · ${whole(requests.total)} requests, ${fixed(requests.per_second, 1)} per second · ` +
    `${whole(requests.degraded)} degraded · ${whole(requests.refused)} refused`;
  byId("summary").className = requests.degraded || requests.refused ? "" : "soft";
  charts(live.ne);
  table("ne", ["surface", ["task", "left"], ["arm", "left"], "rows", "NE", "predicted / observed", "MSE", "of the mean"],
    live.ne.map((row) => [row.surface, [row.task, "left"], [row.arm, "left"], whole(row.n), fixed(row.ne, 4), fixed(row.calibration, 3), fixed(row.mse, 3), fixed(row.base_mse, 3)]),
    "no outcomes of served requests are known yet");
  table("arms", ["surface", ["task", "left"], ["arm", "left"], "share", "rows", "users", "mean", ["against", "left"], "difference", "95 %", "p"],
    live.arms.map((row) => [row.surface, [row.task, "left"], [row.arm, "left"], `${fixed(row.share * 100, 1)} %`, whole(row.rows), whole(row.users), fixed(row.mean, 4), [row.against ?? "", "left"],
      fixed(row.difference, 4), row.p === null ? "–" : `${fixed(row.low, 4)} … ${fixed(row.high, 4)}`, row.p === null ? "–" : row.p < 0.001 ? "< 0.001" : fixed(row.p, 3)]),
    "no two versions share users");
  table("latency", ["stage", "p50", "p99", "count"],
    live.latency.map((row) => [row.stage, span(row.p50_us === null ? null : row.p50_us / 1000), span(row.p99_us === null ? null : row.p99_us / 1000), whole(row.count)]), "no requests yet");
  table("freshness", ["from … to", "p50", "p99", "count"],
    live.freshness.map((row) => [row.what, span(row.p50_ms), span(row.p99_ms), whole(row.count)]), "no events yet");
  table("fms", ["version", ["state", "left"], "publications", "refused", "trained until", "applied"],
    live.fms.map((fm) => [fm.version, [fm.state, "left " + (fm.state === "active" ? "good" : "")], whole(fm.publications),
      [whole(fm.refused), fm.refused ? "bad" : ""], fm.trained_until_ms ? new Date(fm.trained_until_ms).toISOString().slice(0, 16).replace("T", " ") : "–", ago(fm.applied_ms, now)]), "no foundation model in this process");
  table("experts", ["expert", ["version", "left"], ["state", "left"], ["FM", "left"], ["surfaces", "left"], "share", "FLOPs of one-stage"],
    live.experts.map((e) => [e.name, [e.version, "left"], [e.state, "left " + (e.state === "active" ? "good" : "")], [e.fm, "left"], [e.surfaces.join(", "), "left"], `${fixed((e.share ?? 0) * 100, 0)} %`,
      [`${fixed(e.flops_share * 100, 0)} %`, e.over_flops_share ? "bad" : ""]]), "no expert in this process");
  const us = (value) => span(value === null ? null : value / 1000);
  table("plugins", ["plugin", ["version", "left"], "requests", "degraded", "lately", "network", "rank", "instance", "memory", "log lines", ["faults", "left"], ["breaker", "left"]],
    live.plugins.map((p) => [p.name, [p.version, "left"], whole(p.requests), [whole(p.degraded), p.degraded ? "bad" : ""],
      p.degraded_lately === null ? "–" : `${fixed(p.degraded_lately * 100, 0)} %`, us(p.network_us), us(p.rank_us), us(p.instance_us), `${fixed(p.memory_bytes / 1048576, 1)} MiB`,
      [whole(p.log_lines) + (p.log_lines_dropped ? ` (${whole(p.log_lines_dropped)} dropped)` : ""), p.log_lines_dropped ? "bad" : ""],
      [Object.entries(p.faults).map(([cause, count]) => `${cause} ${count}`).join(", ") || "none", "left"], [p.breaker, "left " + (p.breaker === "closed" ? "good" : "bad")]]), "no plugin in this process");
}

async function ask() {
  try {
    const token = sessionStorage.getItem("token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const answer = await fetch("v1/live", { cache: "no-store", headers });
    if (answer.status === 401) throw new Error("it needs a token: open this page with #TOKEN at the end of its address");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    byId("summary").textContent = `the daemon does not answer (${error.message}); trying again`;
    byId("summary").className = "bad";
  }
  setTimeout(ask, 1000);
}
ask();
