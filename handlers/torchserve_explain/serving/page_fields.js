// The form: methods and parameters, all of them from the archive's own report of what it can be asked.

const find = (selector, inside = document) => inside.querySelector(selector);
const report = JSON.parse(find("#report").textContent);
const form = find("#form");
const LISTED = 5000; // suggestions that a browser still lists quickly
const OWN = new Set(["method", "output", "values", "audit"]); // the page chooses these itself
const FIRST = new Set(["target", "versus"]); // beside the methods, not among the settings
const EMPTY = { target: "the predicted class", versus: "nothing: the class by itself" };

const words = (name) => name.replaceAll("_", " ");
const sentence = (text) => text[0].toUpperCase() + text.slice(1);
const TITLES = { versus: "Rather than" };
const title = (name) => TITLES[name] ?? sentence(words(name));
const methodTitle = (name) => (name.length <= 4 ? name.toUpperCase() : title(name)); // LIME, but Saliency
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

function buildMethods() {
  const chosen = report.parameters.method.default;
  const isChosen = (name) => chosen.includes(name) || chosen.includes("all");
  find("#methods").append(
    ...report.methods.map((m) => methodOption(m.name, m.description, { checked: isChosen(m.name) })),
    ...Object.entries(report.refused).map(([name, why]) => methodOption(name, `Not for this model: ${why}`, { disabled: true })),
  );
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

// The fields of a request for one method: those that it uses.
function fieldsFor(method) {
  const values = filledIn();
  const used = Object.entries(values).filter(([name]) => isUsed(name, [method], values));
  const output = report.parameters.output.default === "json" ? {} : { output: "json" };
  return { method: method.name, ...Object.fromEntries(used), ...output };
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
