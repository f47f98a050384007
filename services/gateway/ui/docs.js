// Renders /openapi.json: every path, its fields, its answers.

const spec = await (await fetch("/openapi.json")).json();

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

// A sentence of the description: what stands in backticks is code.
function say(tag, text = "") {
  const parts = text.split("`");
  return make(tag, "", ...parts.map((part, index) => (index % 2 ? make("code", part) : part)));
}

const named = (ref) => ref.split("/").pop();

function kind(schema) {
  if (schema.$ref) return named(schema.$ref);
  if (schema.anyOf) {
    const options = schema.anyOf.filter((option) => option.type !== "null").map(kind);
    return options.join(" or ") || "null";
  }
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  // JSON.parse rounds what is beyond 2^53; the largest seed is the only such number.
  const most = schema.maximum > 2 ** 53 ? "2^63 − 1" : schema.maximum;
  if (most !== undefined) return `${schema.type} from ${schema.minimum} to ${most}`;
  if (schema.minimum !== undefined) return `${schema.type} from ${schema.minimum}`;
  if (schema.maxLength) return `string of up to ${schema.maxLength.toLocaleString("en")} characters`;
  return schema.type ?? "anything";
}

function table(ref) {
  const schema = spec.components.schemas[named(ref)];
  const body = document.createElement("tbody");
  for (const [name, property] of Object.entries(schema.properties)) {
    const required = schema.required?.includes(name) && !property.const;
    body.append(
      make("tr", "", make("td", "", make("code", name)), make("td", kind(property)),
        say("td", `${required ? "Required. " : ""}${property.description ?? ""}`)),
    );
  }
  const head = make("thead", "", make("tr", "", make("th", "Field"), make("th", "Holds"), make("th", "Meaning")));
  const wrap = make("div", "", make("table", "", head, body));
  wrap.className = "table";
  return wrap;
}

// Schemas reached from one, each once, in order.
function reachable(ref, found = new Set()) {
  if (found.has(ref)) return found;
  found.add(ref);
  const text = JSON.stringify(spec.components.schemas[named(ref)]);
  for (const [, next] of text.matchAll(/"\$ref":"([^"]+)"/g)) reachable(next, found);
  return found;
}

function operation(path, method, details) {
  const section = make("section");
  section.className = "panel";
  const label = make("span", method.toUpperCase());
  label.className = "method";
  section.append(make("h2", "", label, make("code", path)), make("p", details.summary));
  if (details.description) section.append(say("p", details.description));
  const input = details.requestBody?.content["application/json"].schema.$ref;
  if (input) section.append(make("h3", "Body"), table(input));
  for (const parameter of details.parameters ?? []) {
    section.append(make("p", "", make("code", parameter.name), ` ${parameter.description}`));
  }
  for (const [status, answer] of Object.entries(details.responses)) {
    section.append(say("h3", `${status}: ${answer.description}`));
    if (status >= 400) continue;
    const refs = Object.values(answer.content ?? {}).flatMap((one) => one.schema?.$ref ?? []);
    const all = new Set(refs.flatMap((ref) => [...reachable(ref)]));
    for (const ref of all) {
      const about = spec.components.schemas[named(ref)].description ?? "";
      const more = make("details", "", make("summary", named(ref)), say("p", about), table(ref));
      section.append(more);
    }
  }
  return section;
}

document.querySelector("#about").replaceWith(say("p", spec.info.description));
document.querySelector("#example").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="none")
reply = client.images.generate(
    prompt="a red apple", n=2, extra_body={"seed": 7, "num_inference_steps": 20}
)`;
for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, details] of Object.entries(methods)) {
    document.querySelector("#paths").append(operation(path, method, details));
  }
}
