// What the page does beyond showing: find, filter, sort, point, pick. It reads everything from the document itself.
//
// State lives in one object; `#find=text` and `#t17` in the address set it, so a finding can be linked to.
// Text goes in through textContent only: tensor names are not ours.

(() => {
  "use strict";

  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const [NAME, ROLE, ERROR, SCHEME, BITS, SHAPE, NOTES] = [0, 1, 3, 5, 6, 8, 9]; // columns of the tensor table
  const state = { find: "", role: "", kind: "all" };

  const plot = byId("plot");
  const ring = byId("ring");
  const tip = byId("tip");
  const table = byId("tensors-table");
  const rows = [...table.tBodies[0].rows].map((element) => ({
    element,
    text: [NAME, ROLE, SCHEME, NOTES].map((column) => element.cells[column].textContent).join(" ").toLowerCase(),
    role: element.cells[ROLE].textContent,
    kind: element.dataset.kind,
    noted: "noted" in element.dataset,
  }));
  const rowOf = new Map(rows.map((row) => [row.element.id.slice(1), row]));
  const points = all("#plot .points use").map((element) => ({ element, row: rowOf.get(element.dataset.t) }));
  let current = null; // the point under the pointer or the arrow keys

  // ---- find and filter ------------------------------------------------------------------------------------------

  const matches = (row, words) =>
    words.every((word) => row.text.includes(word)) && (!state.role || row.role === state.role);

  function apply() {
    const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const kindFits = state.kind === "all" || row.kind === state.kind || (state.kind === "noted" && row.noted);
      const show = kindFits && matches(row, words);
      row.element.hidden = !show;
      shown += show;
    }
    const filtering = words.length > 0 || state.role !== "";
    const plotted = highlight(words, filtering);
    for (const box of all(".find")) if (box.value !== state.find) box.value = state.find;
    for (const button of all(".legend button")) {
      button.setAttribute("aria-pressed", String(button.dataset.role === state.role));
    }
    for (const output of all(".found")) {
      const inPlot = output.htmlFor.contains("find-plot");
      const count = inPlot ? plotted : shown;
      const total = inPlot ? points.length : rows.length;
      const unfiltered = inPlot ? !filtering : shown === total;
      output.textContent = unfiltered ? `${total} tensors` : count ? `${count} of ${total} tensors` : "no tensor matches";
    }
  }

  function highlight(words, filtering) {
    if (!plot) return 0;
    const hits = points.filter((point) => matches(point.row, words));
    const marked = new Set(hits);
    for (const point of points) point.element.classList.toggle("hit", filtering && marked.has(point));
    for (const line of all("#plot polyline")) line.classList.toggle("hit", line.dataset.role === state.role && !words.length);
    plot.classList.toggle("finding", filtering);
    plot.classList.toggle("many", hits.length > 12);
    if (filtering && hits.length === 1) point(hits[0]);
    else point(null);
    return hits.length;
  }

  function setFind(text) {
    state.find = text;
    history.replaceState(null, "", text ? `#find=${encodeURIComponent(text)}` : location.pathname + location.search);
    apply();
  }

  function readAddress() {
    const hash = location.hash;
    if (hash.startsWith("#find=")) {
      try {
        state.find = decodeURIComponent(hash.slice(6));
      } catch {
        state.find = hash.slice(6); // a lone % is text
      }
      apply();
      if (plot && state.find) byId("errors").scrollIntoView();
    } else if (/^#t\d+$/.test(hash)) {
      showRow(rowOf.get(hash.slice(2)));
    }
  }

  function showRow(row) {
    if (!row) return;
    if (row.element.hidden) {
      Object.assign(state, { find: "", role: "", kind: "all" });
      byId("kind").value = "all";
      apply();
    }
    for (const other of all("tr.here")) other.classList.remove("here");
    row.element.classList.add("here");
    if (pick) showWeights(row);
    row.element.scrollIntoView({ block: "center" });
    point(points.find((candidate) => candidate.row === row) || null);
  }

  // ---- the plot --------------------------------------------------------------------------------------------------

  const x = (point) => point.element.x.baseVal.value;
  const y = (point) => point.element.y.baseVal.value;
  const visible = () => points.filter((point) => !plot.classList.contains("finding") || point.element.classList.contains("hit"));

  function point(target) {
    current = target;
    tip.hidden = !target;
    ring.toggleAttribute("hidden", !target);
    if (!target) return;
    ring.setAttribute("transform", `translate(${x(target)} ${y(target)}) scale(2)`);
    const cells = target.row.element.cells;
    const name = document.createElement("b");
    name.textContent = cells[NAME].textContent;
    const error = cells[ERROR].textContent;
    const detail = [
      error === "exact" ? error : `${error} dB`,
      `${cells[SCHEME].textContent}, ${cells[BITS].textContent} bits`,
      cells[NOTES].textContent,
    ];
    tip.replaceChildren(name, detail.filter(Boolean).join(" · "));
    placeTip(target);
    plot.setAttribute("aria-description", tip.textContent);
  }

  function placeTip(target) {
    const frame = tip.parentElement.getBoundingClientRect();
    const spot = target.element.getBoundingClientRect();
    const centre = spot.left + spot.width / 2 - frame.left;
    const left = Math.max(0, Math.min(centre - tip.offsetWidth / 2, frame.width - tip.offsetWidth));
    const above = spot.top - frame.top - tip.offsetHeight - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > -40 ? above : spot.bottom - frame.top + 10}px`;
  }

  function nearest(event) {
    const area = plot.getBoundingClientRect();
    let best = null;
    let distance = 28; // CSS pixels
    for (const candidate of visible()) {
      const away = Math.hypot(area.left + x(candidate) - event.clientX, area.top + y(candidate) - event.clientY);
      if (away < distance) [best, distance] = [candidate, away];
    }
    return best;
  }

  function step(key) {
    const candidates = visible();
    if (!candidates.length) return null;
    if (key === "Home" || !current || !candidates.includes(current)) return candidates[0];
    if (key === "End") return candidates[candidates.length - 1];
    const at = candidates.indexOf(current);
    const onward = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
    const sameRole = key === "ArrowLeft" || key === "ArrowRight"; // up and down: the neighbour in file order
    for (let i = at + onward; i >= 0 && i < candidates.length; i += onward) {
      if (!sameRole || candidates[i].row.role === current.row.role) return candidates[i];
    }
    return current;
  }

  const open = (target) => { if (target) location.hash = target.row.element.id; };

  if (plot) {
    plot.addEventListener("pointermove", (event) => point(nearest(event)));
    plot.addEventListener("pointerleave", () => point(null));
    plot.addEventListener("click", (event) => open(nearest(event)));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Enter") return open(current);
      if (event.key === "Escape") return point(null);
      if (!/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key)) return;
      event.preventDefault();
      point(step(event.key));
      current.element.scrollIntoView({ block: "nearest", inline: "nearest" });
      placeTip(current);
    });
    for (const button of all(".legend button")) {
      button.addEventListener("click", () => {
        state.role = state.role === button.dataset.role ? "" : button.dataset.role;
        apply();
      });
    }
    new ResizeObserver(() => point(current)).observe(plot);
  }

  // ---- the weights of one tensor ------------------------------------------------------------------------------------

  const pick = byId("pick");
  const withWeights = rows.filter((row) => row.element.dataset.h);

  function shares(base64) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true) / 65535);
  }

  const outline = (base64) => // as plot.py draws it
    "M0 100" + shares(base64).map((share, i) => `V${(100 - 96 * Math.sqrt(share)).toFixed(1)}H${i + 1}`).join("") + "V100";

  const short = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-4 ? value.toExponential(2) : Number(value.toPrecision(3)).toString());

  function showWeights(row) {
    if (!row || !row.element.dataset.h) return;
    const [reach, values, sampled, source, decoded] = row.element.dataset.h.split(" ");
    const cells = row.element.cells;
    const name = cells[NAME].textContent;
    pick.value = row.element.id.slice(1);
    byId("picked").textContent = name;
    byId("h-source").setAttribute("d", outline(source));
    byId("h-decoded").setAttribute("d", decoded ? outline(decoded) : "M0 0");
    byId("h-picture").setAttribute("aria-label", `Histogram of the weights of ${name}, from −${short(+reach)} to ${short(+reach)}`);
    const ticks = [-reach, -reach / 2, 0, reach / 2, +reach].map((tick) => short(tick).replace("-", "−"));
    [...byId("h-axis").children].forEach((tick, i) => { tick.textContent = ticks[i]; });
    const error = cells[ERROR].textContent;
    const share = values / cells[SHAPE].dataset.v;
    const facts = [
      /\d/.test(error) ? `${error} dB` : error,
      row.kind === "quantized" ? cells[SCHEME].textContent : "not quantized",
      cells[BITS].textContent,
      cells[SHAPE].textContent,
      `${(+values).toLocaleString("en")} weights in ${(+sampled).toLocaleString("en")} rows, ${(100 * share).toFixed(1)}\u00a0%`,
    ];
    const input = row.element.dataset.input; // has a strip below
    facts.push(input ?? "not recorded");
    [...byId("h-facts").querySelectorAll("dd")].forEach((fact, i) => { fact.textContent = facts[i]; });
    for (const label of all(".strips [data-input]")) label.classList.toggle("here", label.dataset.input === input);
    for (const cell of all(".heat rect")) {
      cell.classList.toggle("here", cell.dataset.t === pick.value);
      if (cell.dataset.t === pick.value) cell.parentNode.append(cell); // above its neighbours, with the whole outline
    }
  }

  if (pick) {
    for (const row of withWeights) pick.add(new Option(row.element.cells[NAME].textContent, row.element.id.slice(1)));
    const step = (by) => {
      const at = withWeights.findIndex((row) => row.element.id.slice(1) === pick.value);
      showWeights(withWeights[(at + by + withWeights.length) % withWeights.length]);
    };
    pick.addEventListener("change", () => showWeights(rowOf.get(pick.value)));
    byId("pick-before").addEventListener("click", () => step(-1));
    byId("pick-next").addEventListener("click", () => step(1));
    showWeights(rowOf.get(byId("weights").dataset.row));
    for (const map of all(".heat")) {
      map.addEventListener("click", (event) => showWeights(rowOf.get(event.target.closest("[data-t]")?.dataset.t)));
    }
  }

  // ---- the table -------------------------------------------------------------------------------------------------

  const sortKey = (element, column) => {
    const cell = element.cells[column];
    const text = cell.dataset.v ?? cell.textContent;
    return cell.classList.contains("n") ? (text === "" ? -Infinity : Number(text.replace("−", "-"))) : text;
  };
  const names = new Intl.Collator("en", { numeric: true });

  table.tHead.addEventListener("click", (event) => {
    const header = event.target.closest("th");
    if (!header) return;
    const column = header.cellIndex;
    const numeric = rows.length > 0 && rows[0].element.cells[column].classList.contains("n");
    const before = header.getAttribute("aria-sort");
    const ascending = before === "none" ? !numeric : before === "descending"; // numbers: largest first
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const keyed = rows.map((row) => [sortKey(row.element, column), row.element]);
    const compare = numeric ? (a, b) => (a < b ? -1 : a > b ? 1 : 0) : names.compare;
    keyed.sort((a, b) => (ascending ? 1 : -1) * compare(a[0], b[0]));
    table.tBodies[0].append(...keyed.map(([, element]) => element));
  });

  byId("kind").addEventListener("change", (event) => {
    state.kind = event.target.value;
    apply();
  });
  for (const box of all(".find")) box.addEventListener("input", () => setFind(box.value));

  addEventListener("hashchange", readAddress);

  document.documentElement.classList.add("live"); // shows the search boxes
  apply();
  readAddress();
})();
