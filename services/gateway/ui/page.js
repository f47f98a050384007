// The page: a form, and one card for each picture. One picture is one streaming request, so each
// has its own progress and its own cancel button (closing the connection cancels).

const form = document.querySelector("#form");
const field = (name) => form.elements.namedItem(name);
const MAX_TRIES = 30;
const STAGES = { running: "Starting…", encoding: "Reading the prompt…", denoising: "Starting…" };

// --- the server: its health and its models --------------------------------------------------

let models = [];

async function watchHealth() {
  const pill = document.querySelector("#health");
  const show = (state, text) => {
    pill.dataset.state = state;
    pill.textContent = text;
  };
  for (;;) {
    let isReady = false;
    try {
      const answer = await (await fetch("/readyz")).json();
      isReady = answer.ready;
      show(isReady ? "ready" : "waiting", isReady ? "Ready" : `Not ready: ${answer.reasons.join(", ")}`);
      if (isReady && !models.length) await loadModels();
    } catch {
      show("away", "The server does not answer");
    }
    await new Promise((wake) => setTimeout(wake, isReady ? 5000 : 1500));
  }
}

async function loadModels() {
  models = (await (await fetch("/v1/models")).json()).data;
  field("model").replaceChildren(...models.map((model) => new Option(model.id)));
  document.querySelector("#models").hidden = models.length < 2;
  field("model").onchange = showModel;
  showModel();
}

function showModel() {
  const model = models.find((one) => one.id === field("model").value) ?? models[0];
  if (!model) return;
  const { defaults, limits } = model;
  const sampler = field("sampler");
  sampler.replaceChildren(...model.samplers.map((name) => new Option(name)));
  sampler.value = defaults.sampler;
  field("size").replaceChildren(new Option("auto", "auto"), ...sizes(model));
  const steps = field("num_inference_steps");
  steps.placeholder = defaults.num_inference_steps;
  sampler.onchange = () => (steps.max = limits.num_inference_steps[sampler.value]);
  sampler.onchange();
  field("guidance_scale").placeholder = defaults.guidance_scale;
}

function sizes({ defaults, sizes: { multiple, max_side: max } }) {
  const [width, height] = defaults.size.split("x").map(Number);
  const shapes = [[1, 1], [1.5, 1], [1, 1.5], [0.5, 0.5], [1.5, 1.5], [2, 2]];
  return shapes
    .map(([x, y]) => [x * width, y * height])
    .filter((sides) => sides.every((side) => side <= max && side % multiple === 0))
    .map(([x, y]) => new Option(`${x}×${y}`, `${x}x${y}`));
}

// --- the form -------------------------------------------------------------------------------

function readForm() {
  const body = { prompt: field("prompt").value.trim() };
  for (const name of ["negative_prompt", "size", "sampler", "guidance_skip", "output_format", "model"]) {
    if (field(name).value) body[name] = field(name).value;
  }
  for (const name of ["num_inference_steps", "guidance_scale"]) {
    if (field(name).value) body[name] = Number(field(name).value);
  }
  return body;
}

function complain(message, name) {
  const problem = document.querySelector("#problem");
  problem.textContent = message;
  problem.hidden = !message;
  for (const each of form.elements) each.removeAttribute("aria-invalid");
  const guilty = name && field(name);
  if (!message || !guilty) return;
  guilty.setAttribute("aria-invalid", "true");
  if (guilty.closest("details")) guilty.closest("details").open = true;
  guilty.focus();
}

// The server names a field as the API does; the form's label says more to its reader.
function inFormWords({ message, param }) {
  const label = field(param)?.closest("label")?.firstChild.textContent.trim();
  return label ? message.replace(`'${param}'`, label) : message;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  complain("");
  const body = readForm();
  if (!body.prompt) return complain("Say first what the picture should show.", "prompt");
  const seed = field("seed").value.trim();
  if (!/^[0-9]*$/.test(seed)) return complain("A seed is a whole number, 0 or more.", "seed");
  // Seeds are sent as they were typed: numbers beyond 2^53 would not survive in JavaScript.
  for (let index = 0; index < Number(field("n").value); index += 1) {
    addCard({ ...body }, seed && (BigInt(seed) + BigInt(index)).toString());
  }
});

field("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

// --- a picture ------------------------------------------------------------------------------

function addCard(body, seed) {
  const card = document.querySelector("#card").content.firstElementChild.cloneNode(true);
  const part = (name) => card.querySelector(name);
  const tool = (name) => card.querySelector(`[data-do="${name}"]`);
  const [width, height] = (/^\d+x\d+$/.test(body.size) ? body.size : "1x1").split("x");
  card.style.setProperty("--ratio", `${width} / ${height}`);
  part(".caption").textContent = body.prompt;
  document.querySelector("#pictures").prepend(card);
  document.querySelector("#empty").hidden = true;
  card.scrollIntoView({ block: "nearest" });

  let stopper;
  const show = (state, text, share) => {
    card.dataset.state = state;
    part(".stage").textContent = text;
    part("progress").value = share ?? part("progress").value;
    part("progress").hidden = state !== "waiting";
    tool("cancel").hidden = state !== "waiting";
    tool("again").hidden = state !== "failed";
  };
  const progress = ({ state, step, num_steps: steps, queue_position: position }) => {
    if (steps && step >= steps) show("waiting", "Developing the picture…", 1);
    else if (step) show("waiting", `Step ${step} of ${steps}`, step / steps);
    else if (position) show("waiting", `In the queue, number ${position}`, 0);
    else show("waiting", STAGES[state] ?? "In the queue…", 0);
  };
  const finish = (event) => {
    const bytes = Uint8Array.from(atob(event.b64_json), (char) => char.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: `image/${event.output_format}` }));
    const image = part("img");
    image.src = url;
    image.alt = body.prompt;
    image.hidden = false;
    const facts = [`seed ${event.seed}`, event.size.replace("x", "×")];
    if (event.skipped_steps.length) facts.push(`${event.skipped_steps.length} steps sped up`);
    part(".facts").textContent = [facts.join(" · "), ...event.warnings].join(" — ");
    tool("save").href = url;
    tool("save").download = `${slug(body.prompt)}-${event.seed}.${event.output_format}`;
    tool("save").hidden = false;
    tool("reuse").hidden = false;
    tool("reuse").onclick = () => {
      document.querySelector("#advanced").open = true;
      field("seed").value = event.seed;
      field("prompt").value = body.prompt;
      field("seed").focus();
    };
    show("done", "Done");
  };
  const run = async () => {
    stopper = new AbortController();
    show("waiting", "Sending…", 0);
    try {
      await generate(body, seed, { signal: stopper.signal, progress, finish, wait: (text) => show("waiting", text, 0) });
    } catch (error) {
      if (error.name === "AbortError") return show("failed", "Cancelled.");
      if (!error.param) return show("failed", error.message || "The connection was lost.");
      card.remove(); // nothing was made of it: the form says what to change
      document.querySelector("#empty").hidden = document.querySelector(".card") !== null;
      complain(inFormWords(error), error.param);
    }
  };
  tool("cancel").onclick = () => stopper.abort();
  tool("again").onclick = run;
  run();
}

const slug = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "picture";

async function generate(body, seed, { signal, progress, finish, wait }) {
  const json = JSON.stringify({ ...body, stream: true });
  const payload = seed ? `${json.slice(0, -1)},"seed":${BigInt(seed)}}` : json;
  for (let tries = 1; ; tries += 1) {
    const response = await fetch("/v1/images/generations", {
      method: "POST", signal, body: payload, headers: { "Content-Type": "application/json" },
    });
    if (response.ok) return readEvents(response, progress, finish);
    const { error } = await response.json();
    const pause = Number(response.headers.get("Retry-After"));
    if (!pause || tries === MAX_TRIES) throw Object.assign(new Error(error.message), { param: error.param });
    wait(response.status === 429 ? "Busy. Waiting for room…" : `Waiting: ${error.message}`);
    await sleep(pause * 1000, signal);
  }
}

function sleep(ms, signal) {
  return new Promise((wake, fail) => {
    const timer = setTimeout(wake, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      fail(signal.reason);
    });
  });
}

async function readEvents(response, progress, finish) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost before the picture came.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(": ")) progress(JSON.parse(line.slice(2)));
      if (!line.startsWith("data: ")) continue;
      // The seed may be larger than JavaScript's integers: keep its digits.
      const event = JSON.parse(line.slice(6).replace(/"seed":(\d+)/, '"seed":"$1"'));
      if (event.error) throw new Error(event.error.message);
      return finish(event);
    }
  }
}

watchHealth();
