// The answers: a card for each map, with the photo under it, its scale, what it means and what it cost.

const percent = (fraction) => `${(100 * fraction).toFixed(fraction < 0.001 || fraction > 0.999 ? 2 : 1)} %`;
const short = (value) => String(Number(value.toPrecision(3)));
// A class's probability, or a quantity's value.
const measured = ({ probability, value }) => [probability == null ? "" : `, ${percent(probability)}`, value == null ? "" : `, ${short(value)}`].join("");
const png = (base64) => `data:image/png;base64,${base64}`;

const question = ({ target, versus }) => (versus ? `${target.label} rather than ${versus.label}` : target.label);

// What the colours of a map say, in one sentence.
function meaning({ heatmap, target, versus }) {
  const { colormap, from } = heatmap.scale;
  const score = `the score of “${target.label}”${versus ? ` over that of “${versus.label}”` : ""}`;
  if (from < 0) {
    const [up, down] = colormap.split("_");
    const [raised, lowered] = down ? [up, down] : ["The right end's colour", "the left end's"];
    return `${sentence(raised)} raised ${score}, ${lowered} lowered it; what stays grey hardly mattered.`;
  }
  if (heatmap.minimum < 0) return `The brighter, the more a place raised ${score}; what lowered it is not shown.`;
  return `The brighter, the more ${score} depends on that place.`;
}

function completeness({ completeness_error: error, baseline_score: baseline, target, parameters }) {
  const from = `${short(baseline)} (${parameters.baseline ?? "baseline"})`;
  const verdict = error > parameters.max_error ? ", more than asked for: the archive's budget ended" : "";
  return `The map adds up to the score's change from ${from} to ${short(target.score)}, with an error of ${percent(error)}${verdict}.`;
}

// How far an explanation can be trusted, and what it cost, in a few words.
function badges(explanation) {
  const { parameters, evaluations, milliseconds, quality } = explanation;
  const errors = ["completeness_error", "map_error", "sampling_error"].filter((name) => explanation[name] != null);
  const error = (name) => explanation[name] <= (parameters[name.replace(/^.*_/, "max_")] ?? 0.05);
  const measures = Object.entries(quality ?? {}).filter(([, value]) => value != null);
  return [
    ...errors.map((name) => [`${error(name) ? "✓" : "!"} ${title(name)} ${percent(explanation[name])}`, error(name) ? "good" : "bad"]),
    ...measures.map(([name, value]) => [`${title(name)} ${short(value)}`, ""]),
    [`${evaluations} ${evaluations === 1 ? "pass" : "passes"}, ${(milliseconds / 1000).toFixed(2)} s`, ""],
  ].map(([textContent, className]) => make("li", { textContent, className }));
}

function facts(explanation) {
  const { target, versus, parameters, quality } = explanation;
  const rows = [["Explained", `${target.label}${measured(target)}; score ${short(target.score)}`]];
  if (versus) rows.push(["Rather than", `${versus.label}${measured(versus)}; the score is the difference`]);
  if (explanation.completeness_error != null) rows.push(["Completeness", completeness(explanation)]);
  if (explanation.map_error != null) rows.push(["Map error", `about ${percent(explanation.map_error)}`]);
  if (explanation.sampling_error != null) rows.push(["Sampling", `From seed to seed the map varies by ${percent(explanation.sampling_error)}.`]);
  for (const [name, value] of Object.entries(quality ?? {})) {
    rows.push([title(name), value == null ? "not measured" : `${short(value)}. ${report.qualities[name] ?? ""}`]);
  }
  rows.push(["Settings", Object.entries(parameters).map(([name, value]) => `${words(name)} ${told(value)}`).join(", ")]);
  return rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value, dir: "auto" })]);
}

// A line through points [x, y], x from 0 and y from 0 to the values that the box's sides stand for.
function curve(points, right, top, about) {
  const drawn = find("#curve").content.cloneNode(true);
  find("polyline", drawn).setAttribute("points", points.map(([x, y]) => `${(100 * x) / right},${50 - (50 * y) / top}`).join(" "));
  find("svg", drawn).setAttribute("aria-label", about);
  find("figcaption", drawn).textContent = about;
  return drawn;
}

// The path's refinement, and the qualities' curves: numbers between 0 and 1, equally spaced.
function curves({ refinement, quality_details: details }) {
  const ends = (values) => [values[0], values.at(-1)].map(percent).join(" to ");
  const rounds = (refinement ?? []).map((round) => [round.evaluations, round.completeness_error]);
  const [first, last] = [rounds[0], rounds.at(-1)];
  const about = () => `Completeness error: ${percent(first[1])} after ${first[0]} passes, ${percent(last[1])} after ${last[0]}`;
  const refined = rounds.length > 1 ? [curve(rounds, last[0], Math.max(...rounds.map((round) => round[1])), about())] : [];
  const found = Object.entries(details ?? {}).filter(([, detail]) => detail?.curve?.length > 1);
  return [...refined, ...found.map(([name, { curve: values }]) =>
    curve(values.map((value, place) => [place, value]), values.length - 1, 1, `${title(name)}: the target's probability, ${ends(values)}`))];
}

// The map over what the model saw: the part `crop` of the upright photo, at a multiple of the map's size.
function drawStack(stack, { answer, explanation, photo, whole }) {
  const { heatmap_png, overlay_png, scale } = explanation.heatmap;
  const { width, height } = whole ? answer.image : explanation.heatmap;
  stack.replaceChildren(find("#drawing").content.cloneNode(true));
  const canvas = find("canvas", stack);
  const about = `${words(explanation.method)} for ${question(explanation)}`;
  Object.assign(find(".heat", stack), { src: png(heatmap_png), width, height, alt: `Heat map: ${about}` });
  if (!photo.bitmap) { // a format that the server reads and the browser does not
    canvas.replaceWith(make("img", { src: png(overlay_png), width, height, alt: `Heat map over the photo: ${about}` }));
    find(".heat", stack).remove();
    return;
  }
  const [left, top, right, bottom] = whole ? [0, 0, width, height] : answer.image.crop;
  const factor = whole ? Math.min(1, 1344 / Math.max(width, height)) : Math.ceil(448 / Math.max(width, height));
  const side = (length) => Math.max(1, Math.round(factor * length));
  Object.assign(canvas, { width: side(width), height: side(height) });
  canvas.setAttribute("aria-label", whole ? "The whole photo" : "The part of the photo that the model saw");
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // where the photo is transparent, as the server sees it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(photo.bitmap, left, top, right - left, bottom - top, 0, 0, canvas.width, canvas.height);
  stack.classList.toggle("diverging", scale.from < 0); // colours of the photo would be mistaken for the map's
}

function drawScale(element, { colormap, from, to, unit }) {
  const bar = find(".colours", element);
  bar.style.setProperty("background", `linear-gradient(90deg, ${report.colormaps[colormap].join(", ")})`);
  bar.setAttribute("aria-label", `Colours from ${short(from)} to ${short(to)} ${unit ?? ""}`);
  find(".unit", element).textContent = unit ?? "";
  find(".from", element).textContent = short(from);
  find(".to", element).textContent = short(to);
}

// A request as a command line: the same fields, the same file, and a placeholder where a key goes.
function asCurl(url, fileName, fields, keyed) {
  const quoted = (value) => `'${value.replaceAll("'", "'\\''")}'`;
  const file = /[^\w.\- ()]/.test(fileName) ? `"${fileName.replace(/["\\]/g, "\\$&")}"` : fileName;
  const parts = Object.entries(fields).map(([name, value]) => {
    const option = /^[@<"]|;/.test(value) ? "--form-string" : "-F"; // curl reads signs of its own into -F
    return `${option} ${quoted(`${name}=${value}`)}`;
  });
  const key = keyed ? ['-H "Authorization: Bearer $KEY"'] : [];
  return ["curl", ...key, "-F", quoted(`data=@${file}`), ...parts, quoted(url)].join(" ");
}

async function copy(text, what, elsewhere) {
  try {
    await navigator.clipboard.writeText(text);
    say(`The ${what} is copied.`);
  } catch { // without HTTPS a page may not write the clipboard
    elsewhere();
  }
}

function copyCommand(command, box) {
  copy(command, "curl command", () => {
    Object.assign(box, { hidden: false, value: command });
    box.select();
    say("Copy the curl command from the box.");
  });
}

function headline({ method, target, versus, parameters: { layer } }) {
  return `${methodTitle(method)}: ${question({ target, versus })}${layer ? `, ${layer}` : ""}`;
}

function mapCard(shown, command) {
  const card = find("#card").content.cloneNode(true).firstElementChild;
  const { explanation } = shown;
  const { method, target, heatmap } = explanation;
  find("h3", card).textContent = headline(explanation);
  find(".badges", card).append(...badges(explanation));
  find(".about", card).textContent = report.methods.find((known) => known.name === method)?.description ?? "";
  drawStack(find(".stack", card), shown);
  drawScale(find(".scale", card), heatmap.scale);
  find(".meaning", card).textContent = meaning(explanation);
  find("dl", card).append(...facts(explanation));
  find(".curves", card).append(...curves(explanation));
  Object.assign(find(".picture", card), { href: png(heatmap.overlay_png), download: `${method}-${target.index}.png` });
  find(".curl", card).addEventListener("click", () => copyCommand(command, find("textarea", card)));
  return card;
}

function failureCard(method, message) {
  const card = find("#failure").content.cloneNode(true).firstElementChild;
  find("h3", card).textContent = methodTitle(method);
  find(".error", card).textContent = message;
  return card;
}

// Two maps of those shown, one over the other: the slider says how far the left one reaches.
function offerComparison(maps) {
  find("#compare").hidden = maps.length < 2;
  for (const [place, side] of ["#left", "#right"].entries()) {
    const options = maps.map(({ explanation }, value) => make("option", { value, textContent: headline(explanation) }));
    find(side).replaceChildren(...options);
    find(side).value = maps.length < 2 ? "" : place;
  }
  compare(maps);
}

function compare(maps) {
  const stacks = find(".split").querySelectorAll(".stack");
  for (const [place, side] of ["#left", "#right"].entries()) {
    if (find(side).value) drawStack(stacks[place], maps[find(side).value]);
  }
}
