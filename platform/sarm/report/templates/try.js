"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const clean = (text) => String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, "");
  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.map((child) => (child instanceof Node ? child : clean(child))));
    return made;
  };
  const figure = (value) => (Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.001) ? value.toExponential(2) : value ? value.toPrecision(3) : "0");
  const signed = (value) => (value ? (value < 0 ? "\u2212" : "+") : "") + figure(Math.abs(value));
  const side = (value) => (value > 0 ? "up" : value < 0 ? "down" : "none");

  // What has been answered: `cards` of the answers, the head's own weights, names, and the weights that were changed.
  let token = "", model = null, cards = [], chosen = null;
  const base = new Map(), names = new Map(), edits = new Map();

  const weight = (latent) => edits.get(latent) ?? base.get(latent);
  const total = (codes, head) => codes.reduce((sum, [latent, value]) => sum + head(latent) * value, 0);
  const own = (latent) => base.get(latent);
  const whole = (card) => card.codes[card.codes.length - 1];
  const activation = (codes, latent) => codes.find(([one]) => one === latent)?.[1] ?? 0;
  const title = (latent) => names.get(latent) ?? "latent " + latent;

  const fail = (message) => {
    find("fault").textContent = clean(message);
    find("fault").hidden = !message;
  };

  const ask = async (path, body) => {
    const headers = { "Content-Type": "application/json" };
    if (token) headers.Authorization = "Bearer " + token;
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer",
      });
    } catch {
      throw new Error("The server did not answer. Look whether it still runs, and whether the token has letters that no header can hold.");
    }
    const found = await response.json().catch(() => ({}));
    if (response.ok) return found;
    if (response.status === 401) find("access").hidden = false;
    const wait = response.headers.get("Retry-After");
    throw new Error((found.error?.message ?? "The server answered " + response.status + ".") + (wait ? " Try again in " + wait + " s." : ""));
  };

  const greet = async () => {
    try {
      model = (await ask("v1/models")).data[0];
      find("access").hidden = true;
      const edits = model.feature_edits.map((one) => one.features + " at layer " + one.layer).join(", ");
      find("model").textContent = clean("The model is " + model.id + "." + (edits ? " It is edited: features are changed inside its blocks (" + edits + "), and all rewards here are of the edited model." : ""));
      find("path").textContent = clean("POST " + path());
      fail("");
    } catch (error) {
      model = null;
      // That a token is wanted is no fault; that it is a wrong one is.
      fail(find("access").hidden || token ? error.message : "");
      if (!find("access").hidden) find("token").focus();
    }
  };
  const path = () => "v1/models/" + encodeURIComponent(model.id) + "/variants";

  const conversation = (answer) => {
    const turns = [...document.querySelectorAll(".turn")].map((turn) => ({ role: turn.querySelector("select").value, content: turn.querySelector("textarea").value }));
    return [...turns, { role: "user", content: find("prompt").value }, { role: "assistant", content: answer }];
  };

  const score = async () => {
    fail("");
    find("score").disabled = true;
    find("status").textContent = "The answers are being read.";
    try {
      if (!model) await greet();
      if (!model) return;
      const answers = [find("answer-a").value, find("answer-b").value].filter((answer, place) => place === 0 || answer);
      cards = await Promise.all(answers.map((answer) => ask("v1/card", { messages: conversation(answer) })));
      for (const card of cards) for (const one of card.latents) {
        base.set(one.id, one.weight);
        if (one.name) names.set(one.id, one.name);
      }
      chosen = null;
      find("results").hidden = false;
      draw();
    } catch (error) {
      fail(error.message);
    } finally {
      find("score").disabled = false;
      find("status").textContent = "";
    }
  };

  const letters = () => (cards.length > 1 ? ["A", "B"] : ["A"]);
  // By the model's own head, so that rows stay where they are while weights are moved.
  const order = () => {
    const latents = [...new Set(cards.flatMap((card) => whole(card).map(([latent]) => latent)))];
    const size = (latent) => Math.abs(terms(latent, own).reduce((sum, term, place) => (place ? sum - term : term), 0));
    latents.sort((a, b) => size(b) - size(a) || a - b);
    const first = latents.slice(0, Number(find("shown").value));
    return [...first, ...[...edits.keys()].filter((latent) => !first.includes(latent))];
  };
  const terms = (latent, head = weight) => cards.map((card) => head(latent) * activation(whole(card), latent));

  const draw = () => {
    const rows = order(), two = cards.length > 1, labels = letters();
    const cell = (name, ...children) => make("td", { class: "n", "data-name": name }, ...children);
    find("columns").replaceChildren(make("tr", {}, make("th", { scope: "col" }, "feature"), ...labels.map((label) => make("th", { class: "n", scope: "col" }, label)),
      ...(two ? [make("th", { class: "n", scope: "col" }, "A \u2212 B")] : []), make("th", { scope: "col" }, two ? "of the difference" : "of the reward"), make("th", { scope: "col" }, "weight in the head")));
    const parts = [...labels, ...(two ? ["A \u2212 B"] : [])];
    const body = rows.map((latent) => {
      const button = make("button", { type: "button", class: "name", "aria-pressed": "false", dir: "auto" }, title(latent));
      button.addEventListener("click", () => { chosen = chosen === latent ? null : latent; update(); });
      return make("tr", { "data-latent": latent }, make("td", {}, button, ...(names.has(latent) ? [make("div", { class: "muted" }, "latent " + latent)] : [])),
        ...parts.map((part) => cell(part)), make("td", {}, make("span", { class: "bar", "aria-hidden": "true" }, make("i", {}))), make("td", {}, slider(latent, rows)));
    });
    const last = (name, id) => make("tr", { id }, make("td", {}, name), ...parts.map((part) => cell(part)), make("td", {}), make("td", {}));
    find("features").replaceChildren(...body, last("others", "others"), last("reward", "sum"));
    find("texts").replaceChildren(...cards.map(text));
    const flags = cards.flatMap((card, place) => [...card.flags, ...(card.cut ? ["its beginning was cut off to fit"] : [])].map((flag) => "answer " + labels[place] + ": " + flag.replaceAll("_", " ")));
    find("notes").textContent = clean(flags.join("; "));
    update();
  };

  const slider = (latent, rows) => {
    const reach = 2 * Math.max(...rows.map((one) => Math.abs(base.get(one))), Math.abs(weight(latent)));
    const input = make("input", { type: "range", min: -reach, max: reach, step: "any", "aria-label": "weight of " + title(latent) });
    const button = make("button", { type: "button" });
    const set = (value) => {
      if (value === base.get(latent)) edits.delete(latent);
      else edits.set(latent, value);
      update();
    };
    input.addEventListener("input", () => set(Number(Number(input.value).toPrecision(3))));
    button.addEventListener("click", () => set(edits.has(latent) ? base.get(latent) : 0));
    return make("div", { class: "weight" }, input, make("span", { class: "num" }), button);
  };

  const text = (card, place) => {
    const tokens = make("p", { class: "tokens", dir: "auto", tabindex: "0", role: "group", "aria-label": "answer " + letters()[place] + ", token by token" },
      ...card.tokens.map((token) => make("span", {}, token)));
    const show = (at) => {
      for (const one of document.querySelectorAll(".tokens .here")) one.classList.remove("here");
      tokens.children[at].classList.add("here");
      const moved = [...new Set([...card.codes[at], ...card.codes[at + 1]].map(([latent]) => latent))]
        .map((latent) => [latent, weight(latent) * (activation(card.codes[at + 1], latent) - activation(card.codes[at], latent))])
        .filter(([, change]) => change).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 3);
      const after = total(card.codes[at + 1], weight);
      find("detail").textContent = clean("\u201c" + card.tokens[at] + "\u201d " + signed(after - total(card.codes[at], weight)) + ", reward after it " + signed(after)
        + (moved.length ? "; most moved: " + moved.map(([latent, change]) => title(latent) + " " + signed(change)).join(", ") : ""));
    };
    const at = (target) => [...tokens.children].indexOf(target);
    for (const event of ["mouseover", "click"]) tokens.addEventListener(event, (e) => { if (at(e.target) >= 0) show(at(e.target)); });
    tokens.addEventListener("keydown", (e) => {
      const here = at(tokens.querySelector(".here")), step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[e.key];
      if (step === undefined) return;
      e.preventDefault();
      show(Math.min(Math.max(here + step, 0), card.tokens.length - 1));
    });
    return make("div", { class: "text" }, make("h3", {}, "Answer " + letters()[place]), tokens, make("p", { class: "muted begin" }));
  };

  const update = () => {
    const two = cards.length > 1, rewards = cards.map((card) => total(whole(card), weight)), before = cards.map((card) => total(whole(card), own));
    const shown = (values) => (two ? [...values, values[0] - values[1]] : values), all = shown(rewards), was = shown(before);
    find("rewards").replaceChildren(...all.map((value, place) => {
      const standard = place < 2 ? signed((value - model.reward_mean) / model.reward_std) + " standard deviations from the mean training reward" : (value >= 0 ? "A" : "B") + " is preferred";
      return make("div", { "data-value": value }, make("h2", {}, place < 2 ? "Answer " + letters()[place] : "A \u2212 B"), make("span", { class: "big " + side(value) }, signed(value)),
        make("p", { class: "muted" }, standard), ...(edits.size ? [make("p", { class: "muted" }, "was " + signed(was[place]))] : []));
    }));
    const rows = [...document.querySelectorAll("#features tr[data-latent]")], lead = (values) => values[values.length - 1];
    const found = rows.map((row) => shown(terms(Number(row.dataset.latent)))), peak = Math.max(...found.map((values) => Math.abs(lead(values))), 1e-12);
    const fill = (row, values) => values.forEach((value, place) => {
      const cell = row.querySelectorAll("td.n")[place];
      cell.textContent = signed(value);
      cell.className = "n " + side(value);
    });
    rows.forEach((row, place) => {
      const latent = Number(row.dataset.latent), bar = row.querySelector(".bar i");
      fill(row, found[place]);
      bar.className = side(lead(found[place]));
      bar.style.width = (100 * Math.abs(lead(found[place]))) / peak + "%";
      row.querySelector("input").value = weight(latent);
      row.querySelector(".weight .num").textContent = signed(weight(latent));
      row.querySelector(".weight .num").classList.toggle("edited", edits.has(latent));
      row.querySelector(".weight button").textContent = edits.has(latent) ? "reset" : "off";
      row.querySelector("button.name").setAttribute("aria-pressed", String(chosen === latent));
    });
    fill(find("others"), all.map((value, place) => value - found.reduce((sum, values) => sum + values[place], 0)));
    fill(find("sum"), all);
    paint();
    write();
  };

  const paint = () => {
    const head = chosen === null ? weight : (latent) => (latent === chosen ? weight(latent) : 0);
    find("what").textContent = clean(chosen === null ? "What each token does to the reward." : "What each token does to the term of " + title(chosen) + ".");
    const steps = cards.map((card) => card.tokens.map((_, at) => total(card.codes[at + 1], head) - total(card.codes[at], head)));
    const loudest = Math.max(...steps.flat().map(Math.abs), 1e-12);
    document.querySelectorAll(".tokens").forEach((tokens, place) => [...tokens.children].forEach((span, at) => {
      const step = steps[place][at], strength = Math.round((60 * Math.abs(step)) / loudest);
      span.classList.remove("up", "down");
      if (strength >= 3) span.classList.add(side(step));
      span.style.setProperty("--s", strength);
    }));
    document.querySelectorAll(".begin").forEach((line, place) => { line.textContent = "nothing said: " + signed(total(cards[place].codes[0], head)) + ", the whole answer: " + signed(total(whole(cards[place]), head)); });
  };

  const write = () => {
    find("edit").hidden = !edits.size;
    find("no-edit").hidden = edits.size > 0;
    const weights = [...edits].map(([latent, after]) => ({ latent, before: base.get(latent), after }));
    find("json").value = JSON.stringify({ name: find("name").value, weights });
    const inside = model.feature_edits.some((one) => one.of === "server") ? ".edit(features=\"FOLDER\")" : "";
    find("python").value = "sarm.load(" + JSON.stringify(model.id) + ")" + inside + ".edit({" + [...edits].map(([latent, after]) => latent + ": " + after).join(", ") + "})";
    find("posted").textContent = "";
  };

  const earlier = () => {
    const role = make("select", {}, ...["user", "assistant", "system"].map((name) => make("option", {}, name)));
    const remove = make("button", { type: "button" }, "Remove");
    const turn = make("div", { class: "turn" }, make("label", {}, "Role", role), make("label", {}, "Earlier turn", make("textarea", { rows: "2", dir: "auto" })), remove);
    role.value = find("turns").children.length % 2 ? "assistant" : "user";
    remove.addEventListener("click", () => { turn.remove(); find("earlier").focus(); });
    find("turns").append(turn);
    turn.querySelector("textarea").focus();
  };

  const submitted = (form, work) => find(form).addEventListener("submit", (event) => { event.preventDefault(); work(); });
  submitted("access", () => { token = find("token").value.trim(); find("token").value = ""; greet(); });
  submitted("ask", score);
  submitted("edit", async () => {
    try {
      await ask(path(), JSON.parse(find("json").value));
      find("posted").textContent = clean("It is scored from now on, as " + JSON.stringify(find("name").value) + " among the variants of a request.");
    } catch (error) {
      find("posted").textContent = clean(error.message);
    }
  });
  find("ask").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !find("score").disabled) find("ask").requestSubmit(); });
  find("earlier").addEventListener("click", earlier);
  find("shown").addEventListener("change", draw);
  find("reset").addEventListener("click", () => { edits.clear(); draw(); });
  find("name").addEventListener("input", write);
  find("copy").addEventListener("click", async () => {
    find("json").select();
    try {
      await navigator.clipboard.writeText(find("json").value);
      find("copy").textContent = "Copied";
    } catch {
      find("posted").textContent = "It is selected: copy it by hand.";
    }
  });
  greet();
})();
