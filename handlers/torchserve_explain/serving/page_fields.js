// The form: methods and parameters, all of them from the archive's own report of what it can be asked.

const find = (selector, inside = document) => inside.querySelector(selector);
const report = JSON.parse(find("#report").textContent);
const form = find("#form");
const LISTED = 5000; // suggestions that a browser still lists quickly
const OWN = new Set(["method", "output", "values", "audit"]); // the page chooses these itself
const FIRST = new Set(["target", "versus"]); // above the methods, not among the settings
const EMPTY = { target: "the predicted", versus: "nothing" };

const words = (name) => name.replaceAll("_", " ");
const sentence = (text) => text[0].toUpperCase() + text.slice(1);
const TITLES = { target: "Why this class", versus: "Rather than" };
const title = (name) => TITLES[name] ?? sentence(words(name));
const capitals = (word) => word.toUpperCase();
const methodTitle = (name) => (name.length <= 4 ? capitals(name) : title(name).replace(/\b(cam|shap)\b/, capitals)); // LIME, Grad CAM
const told = (value) => (Array.isArray(value) ? value.join(", ") : String(value ?? ""));

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function described(element, ...texts) {
  if (texts.length) element.setAttribute("aria-describedby", texts.map((text) => text.id).join(" "));
  return element;
}

// One method to choose, or one that cannot serve this model with the reason.
function methodOption(name, text, options) {
  const heading = make("b", { id: `method-${name}`, textContent: methodTitle(name) });
  const about = make("small", { id: `about-${name}`, textContent: text });
  const box = described(make("input", { type: "checkbox", name: "method", value: name, ...options }), about);
  box.setAttribute("aria-labelledby", heading.id);
  return make("label", { className: "option" }, box, heading, about);
}

// The few that suit most stand in sight, the others fold by what they answer.
function buildMethods() {
  const { methods, families, refused, parameters } = report;
  const inSight = [...methods].sort((a, b) => b.first - a.first).slice(0, 3);
  const chosen = parameters.method.default.includes("all") ? inSight.map((method) => method.name) : parameters.method.default;
  const option = ({ name, description }) => methodOption(name, description, { checked: chosen.includes(name) });
  const folded = (family) => methods.filter((method) => method.family === family && !inSight.includes(method));
  find("#methods").append(
    ...inSight.map(option),
    ...families.map((family) => fold(sentence(family), folded(family).map(option))),
    fold("Not for this model", Object.entries(refused).map(([name, why]) => methodOption(name, why, { disabled: true }))),
  );
}

function fold(heading, options) {
  const count = make("span", { className: "quiet", textContent: ` ${options.length}` });
  return make("details", { hidden: !options.length }, make("summary", {}, heading, count), ...options);
}

// What is chosen in a fold is in sight.
function unfold() {
  for (const box of form.querySelectorAll("details input:checked")) box.closest("details").open = true;
}

function choice(name, parameter, id) {
  const options = ["", ...(parameter.allowed ?? ["true", "false"])];
  return make("select", { id, name }, ...options.map((value) => make("option", { value, textContent: words(value) })));
}

function number(name, parameter, id) {
  const input = make("input", { id, name, type: "number", step: parameter.kind === "whole" ? 1 : "any" });
  if ("minimum" in parameter) input.min = parameter.minimum;
  if (parameter.maximum <= Number.MAX_SAFE_INTEGER) input.max = parameter.maximum;
  return input;
}

// A label that two classes share names neither: their indices are suggested.
function suggestions(values) {
  const shared = new Set(values.filter((value, index) => values.indexOf(value) !== index));
  return values.map((value, index) =>
    shared.has(value) ? make("option", { value: index, label: value }) : make("option", { value }),
  );
}

function text(name, parameter, id) {
  const input = make("input", { id, name, type: "text", autocomplete: "off", spellcheck: false });
  const values = report[parameter.suggestions] ?? [];
  const also = (parameter.also ?? []).map((value) => make("option", { value }));
  const listed = [...also, ...(values.length <= LISTED ? suggestions(values) : [])];
  if (listed.length) {
    form.append(make("datalist", { id: `${id}-list` }, ...listed));
    input.setAttribute("list", `${id}-list`);
  }
  return input;
}

function choices(name, parameter) {
  const boxes = parameter.allowed.map((value) => {
    const checked = (parameter.default ?? []).includes(value);
    const box = make("input", { type: "checkbox", name, value, checked });
    const meaning = make("small", { textContent: report.qualities[value] ?? "" });
    return make("label", { className: "choice" }, box, words(value), meaning);
  });
  return make("fieldset", {}, make("legend", { textContent: title(name) }), ...boxes);
}

const CONTROLS = { choice, flag: choice, choices, number, whole: number, text };

function fieldRow(name, parameter) {
  const id = `field-${name}`;
  // What is allowed stands in the choices themselves.
  const hint = parameter.allowed ? [] : [make("small", { id: `${id}-hint`, textContent: parameter.description })];
  const control = described((CONTROLS[parameter.kind] ?? text)(name, parameter, id), ...hint);
  const label = parameter.kind === "choices" ? [] : [make("label", { htmlFor: id, textContent: title(name) })];
  const row = make("div", { className: "field" }, ...label, control, ...hint);
  row.dataset.parameter = name;
  return row;
}

function buildFields() {
  for (const [name, parameter] of Object.entries(report.parameters)) {
    if (!OWN.has(name)) find(FIRST.has(name) ? "#first-fields" : "#fields").append(fieldRow(name, parameter));
  }
}

function chosenMethods() {
  const names = new FormData(form).getAll("method");
  return report.methods.filter((method) => names.includes(method.name));
}

// What the form holds, as the server takes it: a list is joined by commas, what is left empty is the server's choice.
function filledIn() {
  const data = new FormData(form);
  const pairs = Object.keys(report.parameters).map((name) => [name, data.getAll(name).filter(Boolean).join(",")]);
  return Object.fromEntries(pairs.filter(([name, value]) => value && !OWN.has(name)));
}

function isUsed(name, methods, values) {
  const parameter = report.parameters[name];
  const on = parameter.with && (values[parameter.with] ?? report.parameters[parameter.with].default);
  return parameter.general || Boolean(on) || methods.some((method) => method.parameters.includes(name));
}

// The settings as an address holds them: neither photo nor key.
const shared = () => new URLSearchParams({ method: chosenMethods().map((method) => method.name).join(","), ...filledIn() });

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of kept) {
    if (!(name in report.parameters)) continue;
    for (const control of form.querySelectorAll(`[name="${name}"]`)) {
      if (control.type === "checkbox") control.checked = value.split(",").includes(control.value);
      else control.value = value;
    }
  }
  unfold();
  updateFields();
}

// The fields of a request for one method: those that it uses. The values come with how a path was refined.
function fieldsFor(method) {
  const values = filledIn();
  const used = Object.entries(values).filter(([name]) => isUsed(name, [method], values));
  const output = report.parameters.output.default === "json" ? {} : { output: "json" };
  const refined = "max_error" in method.defaults ? { values: "true" } : {};
  return { method: method.name, ...Object.fromEntries(used), ...output, ...refined };
}

// Show the fields that a chosen method uses, each with what happens if it is left empty.
function updateFields() {
  const methods = chosenMethods();
  const values = filledIn();
  for (const row of document.querySelectorAll("[data-parameter]")) {
    const name = row.dataset.parameter;
    row.hidden = !isUsed(name, methods, values);
    for (const control of row.querySelectorAll("input, select")) control.disabled = row.hidden;
    const defaults = report.parameters[name].default ?? methods.map((m) => m.defaults[name]).filter((v) => v !== undefined);
    const usual = [...new Set([defaults].flat())].map(told).join(" or ");
    const control = find("select, input", row);
    if (control.options) control.options[0].textContent = usual ? `${words(usual)} (default)` : "default";
    else if (control.type !== "checkbox") control.placeholder = usual || (EMPTY[name] ?? "");
  }
}
