// Checks the daemon's page in headless Chromium: its tables fill, it makes no request to another
// host, and the console shows no error.
//
//   node tests/page/check.mjs http://127.0.0.1:PORT/ [--wait SECONDS] [--screenshot FILE]
//
// It needs only Node 18 and Chromium (set CHROMIUM to its path), because it uses the DevTools
// protocol over a pipe. Without a browser it prints SKIPPED and passes.

import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const NAMES = ["chromium", "chromium-browser", "google-chrome", "chrome"];
const TABLES = ["ne", "freshness", "latency", "fms", "experts", "plugins"];
const LOOK_EVERY_MS = 250;

function options() {
  const [url, ...rest] = process.argv.slice(2);
  if (!url) throw new Error("usage: node tests/page/check.mjs URL [--wait SECONDS] [--screenshot FILE]");
  const of = (name, otherwise) => (rest.includes(name) ? rest[rest.indexOf(name) + 1] : otherwise);
  return { url: new URL(url), waitMs: Number(of("--wait", "60")) * 1000, screenshot: of("--screenshot", null) };
}

function browser() {
  const names = process.env.CHROMIUM ? [process.env.CHROMIUM] : NAMES;
  return names.find((name) => spawnSync(name, ["--version"], { stdio: "ignore" }).status === 0);
}

/** A browser, controlled by messages that end with a zero byte. */
class Chromium {
  constructor(program) {
    this.profile = mkdtempSync(join(tmpdir(), "hypercast-page-"));
    const flags = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-sandbox", "--disable-gpu",
      "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
      `--user-data-dir=${this.profile}`, "--window-size=1280,1500", "about:blank"];
    this.process = spawn(program, flags, { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
    [this.waiting, this.heard, this.next, this.rest] = [new Map(), [], 1, Buffer.alloc(0)];
    this.process.stdio[4].on("data", (bytes) => this.take(bytes));
    this.process.on("exit", (code) => this.waiting.forEach(({ fail }) => fail(new Error(`Chromium ended with ${code}`))));
  }

  take(bytes) {
    this.rest = Buffer.concat([this.rest, bytes]);
    for (let end = this.rest.indexOf(0); end >= 0; end = this.rest.indexOf(0)) {
      const message = JSON.parse(this.rest.subarray(0, end).toString());
      this.rest = this.rest.subarray(end + 1);
      const asked = this.waiting.get(message.id);
      if (!asked) this.heard.push(message);
      else if (message.error) asked.fail(new Error(message.error.message));
      else asked.done(message.result);
      this.waiting.delete(message.id);
    }
  }

  ask(method, params = {}, sessionId = undefined) {
    const id = this.next++;
    this.process.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    return new Promise((done, fail) => this.waiting.set(id, { done, fail }));
  }

  async page() {
    const { targetId } = await this.ask("Target.createTarget", { url: "about:blank" });
    const { sessionId } = await this.ask("Target.attachToTarget", { targetId, flatten: true });
    const ask = (method, params) => this.ask(method, params, sessionId);
    for (const domain of ["Page", "Runtime", "Log", "Network"]) await ask(`${domain}.enable`);
    return ask;
  }

  async close() {
    this.process.removeAllListeners("exit");
    const ended = new Promise((done) => this.process.on("exit", done));
    this.process.kill();
    await ended;
    rmSync(this.profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

/** The rows of each table without its header, the number of charts, and the summary line. */
const LOOK = `(() => {
  const rows = (id) => Math.max(0, document.querySelectorAll("#" + id + " tr").length - 1);
  return JSON.stringify({
    rows: Object.fromEntries(${JSON.stringify(TABLES)}.map((id) => [id, rows(id)])),
    charts: document.querySelectorAll("#charts svg polyline").length,
    broken: document.body.innerText.match(/NaN|undefined|Infinity|\\[object/g) ?? [],
    overflow: document.documentElement.scrollWidth > window.innerWidth,
    summary: document.getElementById("summary").textContent,
  });
})()`;

async function until(ask, waitMs) {
  const end = Date.now() + waitMs;
  for (;;) {
    const { result } = await ask("Runtime.evaluate", { expression: LOOK });
    const seen = result.value ? JSON.parse(result.value) : null;
    const full = seen && TABLES.every((id) => seen.rows[id] > 0) && seen.charts > 0;
    if (full || Date.now() > end) return seen;
    await new Promise((done) => setTimeout(done, LOOK_EVERY_MS));
  }
}

function faults(heard, origin) {
  const all = [];
  for (const { method, params } of heard) {
    if (method === "Runtime.exceptionThrown") all.push(`exception: ${params.exceptionDetails.text}`);
    if (method === "Runtime.consoleAPICalled" && params.type === "error") all.push(`console: ${JSON.stringify(params.args)}`);
    if (method === "Log.entryAdded" && params.entry.level === "error") all.push(`log: ${params.entry.text} ${params.entry.url ?? ""}`);
    if (method === "Network.requestWillBeSent") {
      const { url } = params.request;
      if (!url.startsWith("data:") && new URL(url).origin !== origin) all.push(`request to ${url}`);
    }
  }
  return all;
}

async function main() {
  const { url, waitMs, screenshot } = options();
  const program = browser();
  if (!program) {
    console.error(`SKIPPED page: no Chromium here (looked for ${NAMES.join(", ")}); install one or set CHROMIUM`);
    return;
  }
  const policy = (await fetch(url)).headers.get("content-security-policy") ?? "";
  const chromium = new Chromium(program);
  try {
    const ask = await chromium.page();
    await ask("Page.navigate", { url: url.href });
    const seen = await until(ask, waitMs);
    const wrong = faults(chromium.heard, url.origin);
    if (!policy.includes("default-src 'none'")) wrong.push(`the content security policy is ${JSON.stringify(policy)}`);
    if (!seen) wrong.push("the page has no summary");
    for (const id of seen ? TABLES : []) if (!seen.rows[id]) wrong.push(`table ${id} is empty`);
    if (seen && !seen.charts) wrong.push("there is no chart");
    if (seen?.broken.length) wrong.push(`the page shows ${seen.broken.join(", ")}`);
    if (seen?.overflow) wrong.push("the page is wider than its window");
    if (screenshot) {
      const { data } = await ask("Page.captureScreenshot", { captureBeyondViewport: true });
      writeFileSync(screenshot, Buffer.from(data, "base64"));
    }
    if (wrong.length) throw new Error(`${url}:\n  ${wrong.join("\n  ")}`);
    console.log(`the page is complete: ${JSON.stringify(seen)}`);
  } finally {
    await chromium.close();
  }
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
