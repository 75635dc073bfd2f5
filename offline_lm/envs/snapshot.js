// What a page shows, as text that a language model reads, and where each thing is that can be acted on.
//
// Run once in every new document, before its own scripts: it notes which elements listen for clicks. Then
// `await __offline_lm.look()` gives {text, elements, url, title}. The text is written in the manner of Playwright's aria
// snapshots, shorter: elements without meaning are left out, and references are numbered afresh for each snapshot, so
// that they do not tell how a page came about. `__offline_lm.locate(ref)` brings an element into view and says where.
(() => {
  const CLICKS = new Set(["click", "dblclick"]), PRESSES = new Set(["mousedown", "mouseup", "pointerdown", "touchstart"]);
  const clicked = new WeakSet(), pressed = new WeakSet();
  const listen = EventTarget.prototype.addEventListener;
  EventTarget.prototype.addEventListener = function (type, ...rest) {
    if (this instanceof Element) {
      if (CLICKS.has(type)) clicked.add(this);
      if (PRESSES.has(type)) pressed.add(this);
    }
    return listen.call(this, type, ...rest);
  };

  const ROLES = {
    A: "link", BUTTON: "button", SELECT: "combobox", TEXTAREA: "textbox", OPTION: "option", SUMMARY: "button",
    H1: "heading", H2: "heading", H3: "heading", H4: "heading", H5: "heading", H6: "heading",
    UL: "list", OL: "list", LI: "listitem", TABLE: "table", TR: "row", TD: "cell", TH: "columnheader",
    IMG: "img", CANVAS: "img", NAV: "navigation", DIALOG: "dialog", FORM: "form", PROGRESS: "progressbar",
  };
  const INPUTS = {
    button: "button", submit: "button", reset: "button", image: "button", checkbox: "checkbox", radio: "radio",
    range: "slider", number: "spinbutton", search: "searchbox",
  };
  const ACTED_ON = new Set([
    "link", "button", "combobox", "textbox", "searchbox", "spinbutton", "checkbox", "radio", "slider", "tab", "menuitem",
    "menuitemcheckbox", "menuitemradio", "option", "switch", "treeitem",
  ]);
  const SHAPES = new Set(["rect", "circle", "ellipse", "polygon", "polyline", "path", "line", "text"]);
  const MAX_CHARACTERS = 60000;
  const MAX_NAME = 400;

  const clean = (text) => (text || "").replace(/[\s\u00a0]+/g, " ").trim();
  const skipped = (el) =>
    ["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE", "HEAD"].includes(el.tagName) || api.hidden.some((css) => el.matches(css));

  function role(el) {
    const given = (el.getAttribute("role") || "").split(" ")[0];
    if (given === "presentation" || given === "none") return "";
    if (given) return given;
    if (el.tagName === "A" && !el.hasAttribute("href")) return "";
    if (el.tagName === "SELECT" && (el.multiple || el.size > 1)) return "listbox";
    if (el.tagName === "INPUT") return INPUTS[el.type] || "textbox";
    if (el.isContentEditable && !(el.parentElement && el.parentElement.isContentEditable)) return "textbox";
    return ROLES[el.tagName] || "";
  }

  const WITHIN = "a,button,input,select,textarea,[role],[tabindex],[onclick]";
  const holds = (el) => el.querySelector(WITHIN) !== null || [...el.querySelectorAll("*")].some((one) => clicked.has(one));

  function acts(el, itsRole) {
    if (ACTED_ON.has(itsRole) && el.tagName !== "OPTION") return true;
    if (el === document.body || el === document.documentElement) return false;
    if (clicked.has(el) || el.onclick || el.hasAttribute("tabindex") && (el.tabIndex >= 0 || !holds(el))) return true;
    const pointer = (one) => getComputedStyle(one).cursor === "pointer";
    const looks = pointer(el) && !(el.parentElement && pointer(el.parentElement)) && el.tagName !== "LABEL";
    // A box that may be dragged, as a dialog, is not itself the thing to act on if there are such things in it.
    return (looks || pressed.has(el) || el.onmousedown || el.getAttribute("draggable") === "true") && !holds(el);
  }

  function labels(el) {
    const by = (el.getAttribute("aria-labelledby") || "").split(" ").map((id) => id && document.getElementById(id));
    return [...by, ...(el.labels || [])].filter(Boolean);
  }

  function name(el, itsRole) {
    const own = el.getAttribute("aria-label") || labels(el).map((one) => clean(one.textContent)).join(" ");
    if (clean(own)) return clean(own);
    if (itsRole === "button" && el.tagName === "INPUT") return clean(el.value || el.type);
    if (el.tagName === "INPUT" || el.tagName === "TEXTAREA") return clean(el.placeholder || el.title);
    if (el.tagName === "SELECT") return clean(el.title);
    if (el.tagName === "IMG") return clean(el.alt || el.title);
    return "";
  }

  // What someone sees of a thing without words: what its author calls it, its colour and size.
  function look(el) {
    const style = getComputedStyle(el), box = el.getBoundingClientRect();
    const fill = el instanceof SVGElement ? style.fill : style.backgroundColor;
    const seen = fill && fill !== "none" && !/^rgba\(.*, 0\)$/.test(fill) ? fill.replace(/\s/g, "") + " " : "";
    const called = clean(el.title || el.getAttribute("class"));
    return clean(`${called} ${seen}${Math.round(box.width)}x${Math.round(box.height)}`);
  }

  function state(el, itsRole) {
    const on = [];
    const aria = (key) => el.getAttribute("aria-" + key) === "true";
    if (el.checked === true && (itsRole === "checkbox" || itsRole === "radio") || aria("checked")) on.push("checked");
    if (el.tagName === "TEXTAREA") on.push("multiline");
    if (el.disabled || aria("disabled")) on.push("disabled");
    if (el.selected === true || aria("selected")) on.push("selected");
    if (aria("expanded")) on.push("expanded");
    if (aria("pressed")) on.push("pressed");
    if (el === document.activeElement && el !== document.body) on.push("active");
    return on.map((one) => ` [${one}]`).join("");
  }

  // Its middle, or, where something lies upon that, another point where a click reaches it.
  const POINTS = [[0.5, 0.5], [0.2, 0.2], [0.8, 0.8], [0.8, 0.2], [0.2, 0.8]];
  function where(el) {
    const box = el.getBoundingClientRect();
    for (const [across, down] of POINTS) {
      const x = box.x + box.width * across, y = box.y + box.height * down;
      const hit = document.elementFromPoint(x, y);
      if (hit && el.contains(hit)) return { x, y, reached: true };
    }
    return { x: box.x + box.width / 2, y: box.y + box.height / 2, reached: false };
  }

  const quoted = (text) => JSON.stringify(text.length > MAX_NAME ? text.slice(0, MAX_NAME) + "..." : text);

  function snapshot() {
    const lines = [], elements = [], nodes = [], used = new Set();
    let characters = 0, pending = "";

    function write(depth, text) {
      if (characters > MAX_CHARACTERS) return;
      characters += text.length + 2 * depth + 3;
      lines.push("  ".repeat(depth) + "- " + text);
    }
    function flush(depth) {
      if (clean(pending)) write(depth, "text: " + clean(pending));
      pending = "";
    }
    function children(el, depth) {
      const label = el.closest("label");
      const told = label && label.control && label.contains(label.control);  // as the name of its field
      for (const child of el.childNodes) {
        if (child instanceof Text) pending += told ? " " : child.data;
        else if (child instanceof Element) visit(child, depth);
      }
      if (el.shadowRoot) for (const child of el.shadowRoot.children) visit(child, depth);
    }
    function visit(el, depth) {
      if (skipped(el) || used.has(el) || !el.checkVisibility({ visibilityProperty: true })) return;
      if (el.tagName === "BR") { pending += " "; return; }
      const itsRole = role(el), acted = acts(el, itsRole);
      const shape = el instanceof SVGElement && SHAPES.has(el.tagName);
      const style = getComputedStyle(el);
      const block = !style.display.startsWith("inline") && style.display !== "contents";
      if (!itsRole && !acted && !shape) {
        if (block) flush(depth);
        children(el, depth);
        if (block) flush(depth);
        return;
      }
      flush(depth);
      const shown = itsRole || (shape ? el.tagName : "generic");
      let line = shown, label = name(el, itsRole);
      const contains = holds(el);
      const leaf = !contains && !["list", "table", "row", "form", "dialog", "navigation"].includes(itsRole);
      const field = ["INPUT", "TEXTAREA", "SELECT"].includes(el.tagName);
      if (!label && leaf && !field) label = clean(el.innerText === undefined ? el.textContent : el.innerText);
      if (!label && (acted || shape) && !field && !contains) label = look(el);
      if (label) line += " " + quoted(label);
      line += state(el, itsRole);
      if (acted && !el.disabled) {
        const ref = "e" + (elements.length + 1);
        line += ` [ref=${ref}]`;
        nodes.push(el);
        elements.push({
          ref, role: shown, tag: el.tagName.toLowerCase(), name: label, type: el.type || "", ...where(el),
          opens: el.hasAttribute("aria-haspopup") && el.getAttribute("aria-haspopup") !== "false",
          editable: !el.readOnly && (itsRole === "textbox" || itsRole === "searchbox" || itsRole === "spinbutton"),
          options: el.tagName === "SELECT" ? [...el.options].map((one) => clean(one.text)) : null,
        });
      }
      for (const one of labels(el)) if (!one.contains(el)) used.add(one);
      if (el.tagName === "SELECT") {
        write(depth, line);
        for (const one of el.options) {
          write(depth + 1, "option " + quoted(clean(one.text)) + (one.selected ? " [selected]" : ""));
        }
      } else if (field || el.isContentEditable) {
        const value = el.type === "checkbox" || el.type === "radio" || itsRole === "button" ? ""
          : el.isContentEditable ? clean(el.innerText) : clean(el.value);
        write(depth, line + (value ? ": " + value : ""));
      } else {
        write(depth, line);
        if (!leaf) { children(el, depth + 1); flush(depth + 1); }
      }
    }
    // A label that is written as the name of its field is not written again.
    for (const field of document.querySelectorAll("input,textarea,select")) {
      if (field.checkVisibility({ visibilityProperty: true })) {
        for (const one of field.labels || []) if (!one.contains(field)) used.add(one);
      }
    }
    children(document.body, 0);
    flush(0);
    if (characters > MAX_CHARACTERS) lines.push("- text: (the rest of the page is left out)");
    api.nodes = nodes;
    return { text: lines.join("\n"), elements, url: location.href, title: document.title };
  }

  const api = {
    hidden: [],
    nodes: [],
    pictures: [],
    async look() {
      await Promise.all([...document.images].filter((one) => !one.complete).map((one) => one.decode().catch(() => null)));
      return snapshot();
    },
    // Pictures that styles show later, as on `:hover`, are loaded now: when they come is nothing that a clock governs.
    async ready() {
      const urls = new Set();
      for (const sheet of document.styleSheets) {
        for (const rule of sheet.cssRules) {
          if (!/:hover|:active|:focus|content:/.test(rule.cssText)) continue;
          for (const [, url] of rule.cssText.matchAll(/url\("([^"]+)"\)/g)) urls.add(new URL(url, sheet.href || location));
        }
      }
      api.pictures = [...urls].map((url) => Object.assign(new Image(), { src: url.href }));
      await Promise.all(api.pictures.map((one) => one.decode().catch(() => null)));
    },
    still(css) {
      listen.call(document, "DOMContentLoaded", () => {
        document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
      });
    },
    locate(ref) {
      const el = api.nodes[Number(ref.slice(1)) - 1];
      if (!el || !el.isConnected) return null;
      el.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });
      return where(el);
    },
    focus(ref) {
      const el = api.nodes[Number(ref.slice(1)) - 1];
      if (!el || !el.isConnected) return null;
      el.focus();
      return false;
    },
    // Ready to be typed into, with what it holds selected; true if a value was set instead, as in a date field.
    edit(ref, text) {
      const el = api.nodes[Number(ref.slice(1)) - 1];
      if (!el || !el.isConnected) return null;
      el.focus();
      if (el.isContentEditable) { getSelection().selectAllChildren(el); return false; }
      if (["date", "time", "month", "week", "datetime-local", "color", "range"].includes(el.type)) {
        el.value = text;
        if (el.value !== text) throw new Error(`a field of type ${el.type} does not take this text`);
        el.dispatchEvent(new Event("input", { bubbles: true, composed: true }));
        el.dispatchEvent(new Event("change", { bubbles: true }));
        return true;
      }
      el.select();
      return false;
    },
    choose(ref, label) {
      const el = api.nodes[Number(ref.slice(1)) - 1];
      if (!el || !el.isConnected) return null;
      const option = [...el.options].find((one) => clean(one.text) === label);
      if (!option || option.disabled) return false;
      el.focus();
      if (!el.multiple) el.value = option.value;
      option.selected = true;
      el.dispatchEvent(new Event("input", { bubbles: true, composed: true }));
      el.dispatchEvent(new Event("change", { bubbles: true }));
      return true;
    },
  };
  Object.defineProperty(window, "__offline_lm", { value: api });
})();
