// What a person does: gives a photo, chooses, asks; one request for each method, one after the other.

const place = location.pathname.match(/^(.*)\/explanations\/([^/]+)(?:\/([^/]+))?/);
const [, prefix, model, version] = place ?? ["", "", encodeURIComponent(report.model.name)];
const url = (api) => [`${location.origin}${prefix}`, api, model, ...(version ? [version] : [])].join("/");

let photo = null; // {file, bitmap, address}
let key = ""; // in memory alone
let running = null; // the AbortController of the requests under way
let maps = []; // {answer, explanation, photo} of each card
const answers = new Map(); // of this photo, by the fields that were sent

const say = (message) => { find("#status").textContent = message; };

class Refused extends Error {}
class KeyRefused extends Refused {}

async function ask(api, fields, signal) {
  const body = new FormData();
  body.append("data", photo.file, photo.file.name);
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(url(api), { method: "POST", body, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.");
  }
  const answer = await response.json().catch((error) => { if (error.name === "AbortError") throw error; });
  if (response.ok && answer) return answer;
  if (response.status === 401 || answer?.type === "InvalidKeyException") throw new KeyRefused(askForKey());
  throw new Refused(answer?.message ?? unexplained(response.status));
}

function unexplained(status) {
  const size = `${(photo.file.size / 1e6).toFixed(1)} MB`;
  return status === 413 ? `The photo is too large for the server (${size}).` : `The server answered ${status} without a reason.`;
}

function askForKey() {
  find("#key-form").hidden = false;
  find("#key").focus();
  return key ? "The server refuses this inference key; it may have expired." : "This server asks for an inference key.";
}

async function take(file) {
  running?.abort();
  if (photo) URL.revokeObjectURL(photo.address);
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  running?.abort(); // what was asked meanwhile was of the photo before
  photo = { file, bitmap, address: URL.createObjectURL(file) };
  answers.clear();
  clear();
  find("main").classList.add("given");
  find("#seen").hidden = false;
  Object.assign(find("#preview"), { src: photo.address, hidden: !bitmap, alt: `Your photo, ${file.name}` });
  Object.assign(find("#preview-name"), { href: photo.address, download: file.name, textContent: file.name });
  await predict();
}

async function predict() {
  const shown = find("#prediction");
  const asked = photo;
  shown.setAttribute("aria-busy", "true");
  shown.replaceChildren(make("p", { className: "quiet", textContent: "Looking …" }));
  try {
    const answer = await ask("predictions", {});
    if (asked !== photo) return;
    shown.replaceChildren(...predictionParts(Object.entries(answer)));
    showTarget();
    explain(); // the first one, without being asked
  } catch (error) {
    if (asked === photo) shown.replaceChildren(make("p", { className: "error", textContent: error.message }));
  } finally {
    shown.setAttribute("aria-busy", asked !== photo);
  }
}

function predictionParts(classes) {
  const quantity = report.head === "none";
  const told = quantity ? short : percent;
  const [label, measure] = classes[0];
  const rows = classes.map(([name, share]) => {
    const parts = [make("bdi", { textContent: name }), make("span", { className: "number", textContent: told(share) })];
    const named = report.labels.indexOf(name) === report.labels.lastIndexOf(name) && report.labels.includes(name);
    const inside = named ? make("button", { type: "button", value: name, title: "Ask why this one" }, ...parts)
      : make("span", { className: "plain" }, ...parts); // two classes share the name
    const row = make("li", {}, inside);
    if (!quantity) row.style.setProperty("--share", `${100 * share}%`);
    if (named) inside.addEventListener("click", () => chooseTarget(name));
    return row;
  });
  return [
    make("p", {}, quantity ? "It answers " : "It looks like ", make("b", {}, make("bdi", { textContent: label })), ` (${told(measure)}).`),
    make("ul", { className: "bars" }, ...rows),
    make("small", { textContent: "Choose a class to ask why that one." }),
  ];
}

function chooseTarget(name) {
  const field = find("#field-target");
  field.value = field.value === name ? "" : name;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  explain();
}

function showTarget() {
  const value = find("#field-target").value;
  for (const button of document.querySelectorAll(".bars button")) button.setAttribute("aria-pressed", button.value === value);
}

async function explain() {
  const methods = chosenMethods();
  running?.abort();
  if (!photo) return say("Choose a photo first.");
  if (!methods.length) return say("Choose a method first.");
  const round = (running = new AbortController());
  const progress = showProgress(methods.length);
  let failed = 0;
  try {
    for (const [done, method] of methods.entries()) {
      progress.began(done, method);
      failed += (await explainOne(method, round.signal)) ? 0 : 1;
    }
    say(failed ? `Finished; ${failed} of ${methods.length} failed.` : `Finished: ${methods.length} of ${methods.length}.`);
  } catch (error) {
    if (running === round) say(error.name === "AbortError" ? "Cancelled." : error.message);
  } finally {
    progress.end();
    if (running === round) find("#progress").hidden = true;
  }
}

// Ask for one method and show its maps, or why there are none; a refused key ends the whole round.
async function explainOne(method, signal) {
  const fields = fieldsFor(method);
  const asked = JSON.stringify(fields);
  try {
    if (!answers.has(asked)) answers.set(asked, await ask("explanations", fields, signal));
    signal.throwIfAborted();
    const answer = answers.get(asked);
    const command = asCurl(url("explanations"), photo.file.name, fields, Boolean(key));
    const whole = (fields.region ?? report.parameters.region.default) === "image";
    const found = answer.explanations.map((explanation) => ({ answer, explanation, photo, whole }));
    find("#cards").append(...found.map((shown) => mapCard(shown, command)));
    offerComparison(maps = [...maps, ...found]);
    return true;
  } catch (error) {
    if (!(error instanceof Refused) || error instanceof KeyRefused) throw error;
    find("#cards").append(failureCard(method.name, error.message));
    return false;
  }
}

function clear() {
  find("#cards").replaceChildren();
  offerComparison(maps = []);
  find("#empty").hidden = true;
  say("");
}

function showProgress(count) {
  const start = performance.now();
  let current = "";
  const seconds = () => { find("#elapsed").textContent = `${current} · ${((performance.now() - start) / 1000).toFixed(1)} s`; };
  const timer = setInterval(seconds, 100);
  clear();
  find("#progress").hidden = false;
  return {
    began(done, method) {
      Object.assign(find("progress"), { max: count, value: done });
      current = `${done + 1} of ${count}: ${methodTitle(method.name)}`;
      say(`Explaining ${current}.`);
      seconds();
    },
    end: () => clearInterval(timer),
  };
}

// On a small screen the answers stand above the question.
function showResults() {
  const results = find("#results");
  const { top } = results.getBoundingClientRect();
  if (photo && (top < 0 || top > 0.6 * innerHeight)) results.scrollIntoView();
}

function sampleFile() {
  const bytes = Uint8Array.from(atob(find("#sample img").src.split(",")[1]), (character) => character.charCodeAt(0));
  return new File([bytes], "sample.jpg", { type: "image/jpeg" });
}

function useKey() {
  key = find("#key").value.trim();
  if (photo) predict();
}

function listen() {
  const on = (target, event, act) => target?.addEventListener(event, act);
  const taken = (files) => { if (files?.length) take(files[0]); };
  on(find("#file"), "change", (event) => taken(event.target.files));
  on(find("#sample"), "click", () => take(sampleFile()));
  on(document, "paste", (event) => taken(event.clipboardData.files));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    on(document, kind, (event) => { // a photo that misses the zone must not replace the page
      event.preventDefault();
      find("#drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") taken(event.dataTransfer.files);
    });
  }
  on(form, "input", () => {
    updateFields();
    showTarget();
    history.replaceState(null, "", `#${shared()}`);
  });
  on(form, "submit", (event) => { event.preventDefault(); explain(); showResults(); });
  form.addEventListener("invalid", (event) => { event.target.closest("details")?.setAttribute("open", ""); }, true);
  on(find("#share"), "click", () => copy(`${location.href.split("#")[0]}#${shared()}`, "link to these settings", () => say("Copy the link from the address bar.")));
  on(window, "hashchange", restore);
  on(find("#cancel"), "click", () => running?.abort());
  on(find("#key-form"), "submit", (event) => { event.preventDefault(); useKey(); });
  on(find("#key"), "input", (event) => { key = event.target.value.trim(); });
  on(find("#opacity"), "input", showOpacity);
  on(find("#compare"), "change", () => compare(maps));
  on(find("#split"), "input", (event) => find(".split").style.setProperty("--split", `${event.target.value}%`));
}

function showOpacity() {
  const value = find("#opacity").value;
  find("#results").style.setProperty("--opacity", value / 100);
  find("output").textContent = `${value} %`;
}

buildMethods();
buildFields();
restore();
listen();
find("main").hidden = false;
