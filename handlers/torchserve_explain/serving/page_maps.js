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

function facts(explanation) {
  const { target, versus, parameters, evaluations, milliseconds, quality } = explanation;
  const rows = [["Explained", `${target.label}${measured(target)}; score ${short(target.score)}`]];
  if (versus) rows.push(["Rather than", `${versus.label}${measured(versus)}; the score is the difference`]);
  if (explanation.completeness_error != null) rows.push(["Completeness", completeness(explanation)]);
  if (explanation.map_error != null) rows.push(["Map error", `about ${percent(explanation.map_error)}`]);
  for (const [name, value] of Object.entries(quality ?? {})) {
    rows.push([title(name), value == null ? "not measured" : `${short(value)}. ${report.qualities[name] ?? ""}`]);
  }
  rows.push(["Cost", `${evaluations} model ${evaluations === 1 ? "pass" : "passes"}, ${(milliseconds / 1000).toFixed(2)} s`]);
  const settings = Object.entries(parameters).map(([name, value]) => `${words(name)} ${told(value)}`);
  rows.push(["Settings", settings.join(", ")]);
  return rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]);
}

// A quality measure's curve: numbers between 0 and 1, equally spaced.
function curves(details) {
  return Object.entries(details ?? {}).filter(([, detail]) => detail?.curve?.length > 1).map(([name, { curve }]) => {
    const drawn = find("#curve").content.cloneNode(true);
    const points = curve.map((value, place) => `${(100 * place) / (curve.length - 1)},${50 - 50 * value}`);
    find("polyline", drawn).setAttribute("points", points.join(" "));
    find("svg", drawn).setAttribute("aria-label", `${words(name)}: from ${short(curve[0])} to ${short(curve.at(-1))}`);
    const ends = [curve[0], curve.at(-1)].map(percent).join(" to ");
    find("figcaption", drawn).textContent = `${title(name)}: the target's probability, ${ends}`;
    return drawn;
  });
}

// What the model saw, under the map: the part `crop` of the upright photo at the map's size, or where that is small at a
// multiple of it, as the server's pictures are.
function drawStack(stack, explanation, photo, crop) {
  const { width, height, heatmap_png, overlay_png, scale } = explanation.heatmap;
  const canvas = find("canvas", stack);
  const about = `${words(explanation.method)} for ${question(explanation)}`;
  Object.assign(find(".heat", stack), { src: png(heatmap_png), width, height, alt: `Heat map: ${about}` });
  if (!photo.bitmap) { // a format that the server reads and the browser does not
    canvas.replaceWith(make("img", { src: png(overlay_png), width, height, alt: `Heat map over the photo: ${about}` }));
    find(".heat", stack).remove();
    return;
  }
  const [left, top, right, bottom] = crop;
  const factor = Math.max(1, Math.min(Math.ceil(224 / Math.min(width, height)), Math.floor(336 / Math.max(width, height))));
  Object.assign(canvas, { width: factor * width, height: factor * height });
  canvas.setAttribute("aria-label", "The part of the photo that the model saw");
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // where the photo is transparent, as the server sees it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(photo.bitmap, left, top, right - left, bottom - top, 0, 0, canvas.width, canvas.height);
  stack.classList.toggle("diverging", scale.from < 0); // colours of the photo would be mistaken for the map's
}

function drawScale(element, { colormap, from, to }) {
  const bar = find(".bar", element);
  bar.style.setProperty("background", `linear-gradient(90deg, ${report.colormaps[colormap].join(", ")})`);
  bar.setAttribute("aria-label", `Colours from ${short(from)} to ${short(to)}`);
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

async function copy(command, box) {
  try {
    await navigator.clipboard.writeText(command);
    say("The curl command is copied.");
  } catch { // without HTTPS a page may not write the clipboard
    Object.assign(box, { hidden: false, value: command });
    box.select();
    say("Copy the curl command from the box.");
  }
}

function mapCard(answer, explanation, photo, command) {
  const card = find("#card").content.cloneNode(true).firstElementChild;
  const { method, target, heatmap } = explanation;
  const layer = explanation.parameters.layer ? `, ${explanation.parameters.layer}` : "";
  find("h3", card).textContent = `${methodTitle(method)}: ${question(explanation)}${layer}`;
  find(".about", card).textContent = report.methods.find((known) => known.name === method)?.description ?? "";
  drawStack(find(".stack", card), explanation, photo, answer.image.crop);
  drawScale(find(".scale", card), heatmap.scale);
  find(".meaning", card).textContent = meaning(explanation);
  find("dl", card).append(...facts(explanation));
  find(".curves", card).append(...curves(explanation.quality_details));
  Object.assign(find(".picture", card), { href: png(heatmap.overlay_png), download: `${method}-${target.index}.png` });
  find(".curl", card).addEventListener("click", () => copy(command, find("textarea", card)));
  return card;
}

function failureCard(method, message) {
  const card = find("#failure").content.cloneNode(true).firstElementChild;
  find("h3", card).textContent = methodTitle(method);
  find(".error", card).textContent = message;
  return card;
}
