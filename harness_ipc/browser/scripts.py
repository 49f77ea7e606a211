"""JavaScript that runs in pages: functions whose `this` is an element, and functions that search for one.

They return JSON: ``{"problem": text}`` if the element can't be acted on, ``{"invalid": text}`` for an invalid argument, and
``{"gone": true}`` if the element was removed from its document.
"""

from __future__ import annotations

_COMMON = r"""
const clean = text => text.replace(/\s+/g, " ").trim();
const cut = (text, length) => text.length > length ? text.slice(0, length) + "…" : text;
const describe = element => {
  let text = "<" + element.localName;
  for (const name of ["id", "class", "name", "type", "role", "aria-label", "data-testid", "placeholder", "src"]) {
    const value = element.getAttribute(name);
    if (value) text += ` ${name}="${cut(clean(value), 40)}"`;
  }
  const inside = cut(clean(element.textContent ?? ""), 40);
  return text + ">" + (inside && !["script", "style"].includes(element.localName) ? inside : "");
};
const isVisible = element => element.checkVisibility({visibilityProperty: true}) && element.getClientRects().length > 0;
const isDisabled = element => element.matches(":disabled") || element.closest("[aria-disabled=true]") !== null;
const shadowsIn = root => [...root.querySelectorAll("*")].flatMap(
  element => element.shadowRoot ? [element.shadowRoot, ...shadowsIn(element.shadowRoot)] : []);
"""

# All elements that `selector` matches.
_SEARCH = r"""
const path = selector.match(/^xpath=(.*)|^(\(*\.?\/\/.*)/s);
const all = root => {
  if (!path) return [...root.querySelectorAll(selector)];
  const found = document.evaluate(path[1] ?? path[2], root, null, XPathResult.ORDERED_NODE_SNAPSHOT_TYPE);
  return Array.from({length: found.snapshotLength}, (_, i) => found.snapshotItem(i)).filter(node => node.nodeType === 1);
};
const search = () => {
  const found = all(document);
  return found.length || path ? found : shadowsIn(document).flatMap(all);
};
"""

# Resolved after tasks that the page has queued with setTimeout(…, 0), unless the page has replaced that function.
_BEHIND_QUEUE = r"""
const native = Function.prototype.toString.call(setTimeout).includes("[native code]");
const behindQueue = () => new Promise(done => native ? setTimeout(done) : done());
"""

# True once the document has loaded and its load handlers have run.
LOADED = (
    "(async () => {"
    + _BEHIND_QUEUE
    + """
while (document.readyState !== "complete")
  await new Promise(done => document.addEventListener("readystatechange", done, {once: true}));
await behindQueue();
return {value: true};
})()"""
)

# The address of the document.
ADDRESS = f"(async () => {{{_BEHIND_QUEUE} await behindQueue(); return {{value: location.href}}; }})()"

# True once there is an element, visible if required; False after the timeout in milliseconds. Or {"invalid"}.
ELEMENT = (
    r"""(async (selector, visible, milliseconds) => {"""
    + _COMMON
    + _SEARCH
    + _BEHIND_QUEUE
    + r"""
const found = () => visible ? search().some(isVisible) : search().length > 0;
await behindQueue();
try {
  if (found()) return {value: true};
} catch (error) {
  return {invalid: error.message};
}
return new Promise(done => {
  const end = value => { observer.disconnect(); clearInterval(interval); clearTimeout(timer); done({value}); };
  const look = () => found() && end(true);
  const observer = new MutationObserver(look);
  observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  // For changes that are not mutations of the document: style sheets, animations, shadow roots.
  const interval = setInterval(look, 100);
  const timer = setTimeout(end, milliseconds, false);
});
})"""
)

# The one element that a selector matches, or JSON text: {"count", "near": [texts], "frames": [texts]} or {"invalid"}.
SELECT = (
    r"""(selector => {"""
    + _COMMON
    + _SEARCH
    + r"""
let found;
try {
  found = search();
} catch (error) {
  return JSON.stringify({invalid: error.message});
}
if (found.length > 1) {
  const visible = found.filter(isVisible);
  if (visible.length === 1) found = visible;
}
if (found.length === 1) return found[0];
if (found.length) return JSON.stringify({count: found.length, near: found.slice(0, 5).map(describe), frames: []});

const frames = [...document.querySelectorAll("iframe, frame")].filter(frame => {
  try { return !path && frame.contentDocument?.querySelector(selector); } catch { return false; }
});
const distance = (a, b) => {
  let row = Array.from({length: b.length + 1}, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++)
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
    row = next;
  }
  return row[b.length];
};
const alike = (a, b) => a === b || (a.length > 3 && (b.includes(a) || (b.length < 40 && distance(a, b) <= 2)));
const wanted = [...selector.matchAll(/[#.]([\w-]+)|=\s*["']?([^"'\]]+)/g)].map(match => (match[1] ?? match[2]).toLowerCase());
const names = element => ["id", "class", "name", "aria-label", "data-testid", "placeholder", "href"].flatMap(
  name => (element.getAttribute(name) ?? "").toLowerCase().split(/\s+/)).filter(Boolean);
const near = wanted.length === 0 ? [] : [...document.querySelectorAll("body *")].slice(0, 5000).filter(
  element => names(element).some(name => wanted.some(word => alike(word, name))));
return JSON.stringify({count: 0, near: near.slice(0, 5).map(describe), frames: frames.slice(0, 3).map(describe)});
})"""
)

# Where to click an element, once it is in view and not moving: {"x", "y"} in its frame, and the box of the frame's root.
PLACE = (
    r"""async function(milliseconds, acting) {"""
    + _COMMON
    + r"""
let element = this.nodeType === 1 ? this : this.parentElement;
if (!element?.isConnected) return {gone: true};
if (acting && isDisabled(element)) return {problem: "is disabled"};
if (element.localName === "option") return {problem: "is an option: use select_option() with its select"};
// A hidden input with a visible label.
const label = [...element.labels ?? []].find(isVisible);
if (!isVisible(element) && label) element = label;
if (!isVisible(element)) return {problem: "is not visible"};
const view = element.ownerDocument.defaultView;
const frame = () => new Promise(done => { view.requestAnimationFrame(done); setTimeout(done, 100); });
const box = () => { const at = element.getBoundingClientRect(); return [at.x, at.y, at.width, at.height].join(); };
const end = performance.now() + milliseconds;
for (let last = null; last !== box(); await frame()) {
  if (performance.now() > end) return {problem: "keeps moving"};
  last = box();
  await frame();
  if (!element.isConnected) return {gone: true};
}
const outer = node => node.assignedSlot ?? node.parentNode ?? node.host;
const contains = (around, node) => {
  while (node && node !== around) node = outer(node);
  return Boolean(node);
};
const acts = element.closest("a[href], button, label, summary, [role=button], [role=link]") ?? element;
const hits = (x, y) => {
  let hit = element.ownerDocument.elementFromPoint(x, y);
  for (let inner; inner = hit?.shadowRoot?.elementFromPoint(x, y);) {
    if (inner === hit) break;
    hit = inner;
  }
  const own = hit && (contains(element, hit) || contains(acts, hit) || hit.closest("label")?.control === element);
  return [own, hit];
};
let problem;
for (const block of [null, "center", "end", "start"]) {
  if (block) element.scrollIntoView({block, inline: "center", behavior: "instant"});
  const at = [...element.getClientRects()].find(at => at.width > 0 && at.height > 0);
  if (!at) return {problem: "is not visible: it has no size"};
  const left = Math.max(at.left, 0), right = Math.min(at.right, view.innerWidth);
  const top = Math.max(at.top, 0), bottom = Math.min(at.bottom, view.innerHeight);
  problem = "is outside of what can be scrolled into view";
  if (left >= right || top >= bottom) continue;
  const x = (left + right) / 2, y = (top + bottom) / 2, [own, hit] = hits(x, y);
  if (own) {
    const page = element.ownerDocument.documentElement.getBoundingClientRect();
    return {x, y, framed: view.top !== view, page: [page.left, page.top, page.width, page.height]};
  }
  problem = hit ? `is covered by ${describe(hit)}` : "is outside of what can be seen";
}
return {problem};
}"""
)

# The element that covers an iframe at a point of the page, or null.
COVER = (
    r"""(async (x, y) => {"""
    + _COMMON
    + r"""
await new Promise(done => { requestAnimationFrame(done); setTimeout(done, 100); });
let hit = document.elementFromPoint(x, y);
for (let inner; inner = hit?.shadowRoot?.elementFromPoint(x, y);) {
  if (inner === hit) break;
  hit = inner;
}
if (hit === null) return "the edge of the window";
return ["iframe", "frame", "object", "embed", "fencedframe"].includes(hit.localName) ? null : describe(hit);
})"""
)

FILL = (
    r"""function(text, clear) {"""
    + _COMMON
    + r"""
const element = this.localName === "label" && this.control ? this.control : this;
if (!element.isConnected) return {gone: true};
const kind = element.localName === "input" ? element.type : element.localName;
if (["checkbox", "radio", "button", "submit", "reset", "image"].includes(kind)) return {problem: `is a ${kind}: use click()`};
if (kind === "file") return {problem: "is a file input: use upload_file()"};
if (kind === "select") return {problem: "is a select: use select_option()"};
const isField = ["input", "textarea"].includes(element.localName);
if (!isField && !element.isContentEditable) return {problem: "is no field that takes text"};
if (isDisabled(element)) return {problem: "is disabled"};
if (element.readOnly || element.getAttribute("aria-readonly") === "true") return {problem: "is read-only"};
element.focus();
if (!isField) {
  const selection = element.ownerDocument.getSelection();
  selection.selectAllChildren(element);
  if (!clear) selection.collapseToEnd();
  if (text) element.ownerDocument.execCommand("insertText", false, text);
  else if (clear) element.ownerDocument.execCommand("delete");
  return {};
}
const before = element.value, value = clear ? text : before + text;
if (element.maxLength >= 0 && value.length > element.maxLength)
  return {invalid: `takes at most ${element.maxLength} characters, not ${value.length}`};
const view = element.ownerDocument.defaultView;
const kindOf = element.localName === "input" ? view.HTMLInputElement : view.HTMLTextAreaElement;
// Frameworks override the property on the element.
const set = value => Object.getOwnPropertyDescriptor(kindOf.prototype, "value").set.call(element, value);
set(value);
const shapes = {date: "2025-12-31", time: "23:59", "datetime-local": "2025-12-31T23:59", month: "2025-12", week: "2025-W52",
  color: "#ff8800", number: "a number", range: `a number from ${element.min || 0} to ${element.max || 100}`};
if (kind in shapes && element.value.toLowerCase() !== value.toLowerCase()) {
  set(before);
  return {invalid: `is a ${kind} input, which takes ${/\d/.test(shapes[kind][0]) ? "what looks like " : ""}${shapes[kind]}`};
}
element.dispatchEvent(new view.InputEvent("input", {bubbles: true, composed: true, inputType: "insertText", data: text}));
element.dispatchEvent(new view.Event("change", {bubbles: true}));
return {};
}"""
)

# Select options of a select by value, label or index, and return {"selected": their labels}.
CHOOSE = (
    r"""function(choices) {"""
    + _COMMON
    + r"""
const element = this.localName === "label" && this.control ? this.control : this.closest("select") ?? this;
if (!element.isConnected) return {gone: true};
if (element.localName !== "select") return {problem: "is no select: click() it, then what it shows"};
if (isDisabled(element)) return {problem: "is disabled"};
if (choices.length > 1 && !element.multiple) return {invalid: "takes one option only"};
const options = [...element.options], chosen = [];
for (const choice of choices) {
  const option = typeof choice === "number" ? options.at(choice) : options.find(option => option.value === choice)
    ?? options.find(option => option.label === choice) ?? options.find(option => clean(option.label) === clean(choice));
  if (!option) return {invalid: `has no option ${JSON.stringify(choice)}, but ` +
    cut(options.map(option => JSON.stringify(clean(option.label))).join(", ") || "none", 500)};
  if (option.matches(":disabled")) return {problem: `has the option ${JSON.stringify(choice)}, but it is disabled`};
  chosen.push(option);
}
element.focus();
if (element.multiple) for (const option of options) option.selected = chosen.includes(option);
else if (chosen.length) chosen[0].selected = true;
else element.selectedIndex = -1;
const view = element.ownerDocument.defaultView;
for (const kind of ["input", "change"])
  element.dispatchEvent(new view.Event(kind, {bubbles: true, composed: kind === "input"}));
return {selected: [...element.selectedOptions].map(option => clean(option.label))};
}"""
)

# The file input for an element: itself, the control of a label, or the only one inside. Else a text.
FILE_INPUT = (
    r"""function(count, directories) {"""
    + _COMMON
    + r"""
const inside = this.querySelectorAll?.("input[type=file]") ?? [];
const input = this.localName === "label" && this.control ? this.control : inside.length === 1 ? inside[0] : this;
if (!input.isConnected) return "gone";
if (input.localName !== "input" || input.type !== "file") return "is no file input, and has none inside, or several";
if (isDisabled(input)) return "is disabled";
if (count > 1 && !input.multiple && !input.webkitdirectory) return `takes one file only, not ${count}`;
if (directories && !input.webkitdirectory) return "takes files, not directories";
return input;
}"""
)

ROOT = "function() { return this.ownerDocument.documentElement }"
