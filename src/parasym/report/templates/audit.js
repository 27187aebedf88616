(() => {
  const { data, style } = page;

  // -- network: modules nest, closed ones are one box; each module lays out its members in rows by depth of data flow ----------------------
  const net = data.graph && document.getElementById("net") ? network(data.graph) : null;

  function network(graph) {
    const SVG = "http://www.w3.org/2000/svg";
    const host = document.getElementById("net"), detail = document.getElementById("net-detail"), counter = document.getElementById("net-count");
    const order = topological(graph);
    const root = { key: "", name: "", path: "", children: [], nodes: [], module: true };
    const modules = new Map([["", root]]);
    const ranked = [...graph.nodes].sort((a, b) => order.get(a.id) - order.get(b.id));

    function moduleAt(path) {
      if (modules.has(path)) return modules.get(path);
      const cut = path.lastIndexOf(".");
      const parent = moduleAt(cut < 0 ? "" : path.slice(0, cut));
      const made = { key: "m:" + path, name: path.slice(cut + 1), path, parent, children: [], nodes: [], module: true };
      parent.children.push(made);
      modules.set(path, made);
      return made;
    }
    for (const node of ranked) {
      const parent = moduleAt(node.where || "");
      parent.children.push({ key: "n:" + node.id, name: node.label || node.op, path: node.where || "", parent, nodes: [node], node });
    }
    (function simplify(item) {  // a module of one operator is that operator; a module of one module is that module
      item.children = item.children.map((child) => {
        if (!child.module) return child;
        simplify(child);
        if (child.children.length !== 1) return child;
        const only = child.children[0];
        only.name = only.module ? `${child.name}.${only.name}` : child.name;
        only.parent = item;
        return only;
      });
      item.nodes = item.children.flatMap((child) => child.nodes);
      item.order = Math.min(...item.nodes.map((node) => order.get(node.id)));
      for (const child of item.children) { child.parent = item; child.order ??= order.get(child.nodes[0].id); }
      item.children.sort((a, b) => a.order - b.order);
    })(root);

    const fed = new Set(graph.edges.map((edge) => edge.target));
    const leafOf = new Map();
    (function index(item) { for (const child of item.children) {
      child.source = child.nodes.every((node) => !fed.has(node.id));
      child.module ? index(child) : leafOf.set(child.node.id, child);
    } })(root);
    const inside = (where, path) => path === "" || where === path || where.startsWith(path + ".");
    const found = (item) => item.module || item.path !== item.parent.path ? graph.symmetries.filter((s) => s.where && inside(s.where, item.path)) : [];
    const hurt = (item) => item.module || item.path !== item.parent.path ? graph.collapse.filter((c) => inside(c.where, item.path) && c.count) : [];

    // open level by level while the picture stays small; where a level does not fit, its first module stands for it
    const open = new Set([root.key]);
    let level = root.children.filter((child) => child.module), shown = root.children.length;
    while (level.length) {
      const cost = level.reduce((sum, item) => sum + item.children.length - 1, 0);
      const chosen = shown + cost <= 26 ? level : shown + level[0].children.length <= 40 && level.length > 1 ? [level[0]] : [];
      chosen.forEach((item) => { open.add(item.key); shown += item.children.length - 1; });
      level = chosen.length === level.length ? level.flatMap((item) => item.children.filter((child) => child.module)) : [];
    }

    const pencil = document.createElement("canvas").getContext("2d");
    const width = (text, font) => { pencil.font = font; return pencil.measureText(text).width; };
    const sans = style("--sans"), mono = style("--mono");
    function clip(text, room, font) {
      if (width(text, font) <= room) return text;
      let end = text.length;
      while (end > 1 && width(text.slice(0, end) + "…", font) > room) end -= 1;
      return text.slice(0, end) + "…";
    }
    const say = (count) => count.toLocaleString("en");
    function summary(item) {
      if (!item.module) return item.node.op === item.name ? "" : item.node.op;
      const ops = new Map();
      item.nodes.forEach((node) => ops.set(node.op, (ops.get(node.op) || 0) + 1));
      return `${say(item.nodes.length)} operators: ` + [...ops].sort((a, b) => b[1] - a[1]).slice(0, 2).map(([op, count]) => (count > 1 ? `${op} ×${count}` : op)).join(", ");
    }

    const GAP = 26, PAD = 14, HEAD = 26, LANE = 11;
    let chosen = null, fit = false, drawn = 0;

    function visible(item) { while (item.parent && !chain(item.parent)) item = item.parent; return item; }
    function chain(item) { for (; item; item = item.parent) if (!open.has(item.key)) return false; return true; }

    function layout(item, pairs) {
      if (!item.module || !open.has(item.key)) {
        const spaces = new Map();
        for (const pair of pairs) if (pair.from === item) for (const edge of pair.edges) spaces.set([edge.space, edge.group].filter(Boolean).join(" · "), Boolean(edge.group));
        item.spaces = [...spaces].filter(([text]) => text);
        item.title = clip(item.name, 190, `12.5px ${sans}`);
        item.sub = clip(summary(item), 190, `11px ${sans}`);
        const dims = found(item).reduce((sum, s) => sum + s.dim, 0), lost = hurt(item).reduce((sum, c) => sum + c.count, 0);
        item.dimText = dims ? `dim ${say(dims)}` : found(item).length ? "discrete" : "";
        item.lostText = lost ? `${say(lost)} collapsed` : "";
        item.label = item.spaces.length ? clip(item.spaces[0][0] + (item.spaces.length > 1 ? ` +${item.spaces.length - 1}` : ""), 230, `10.5px ${mono}`) : "";
        const right = Math.max(width(item.dimText, `11px ${sans}`), width(item.lostText, `600 11px ${sans}`));
        item.boxWidth = Math.max(96, 26 + Math.max(width(item.title, `12.5px ${sans}`), width(item.sub, `11px ${sans}`)) + (right ? right + 16 : 0) + (item.module ? 22 : 0));
        item.boxHeight = item.sub || item.lostText ? 42 : 30;
        item.w = Math.max(item.boxWidth, item.label ? width(item.label, `10.5px ${mono}`) + 8 : 0);
        item.h = item.boxHeight + (item.label ? 16 : 0);
        return;
      }
      const members = item.children;
      const links = new Map();  // edges between members of this module
      for (const pair of pairs) {
        const from = memberOf(pair.from, item), to = memberOf(pair.to, item);
        if (from && to && from !== to && from.order < to.order) links.set(from.key + "→" + to.key, [from, to]);
      }
      members.forEach((member) => { layout(member, pairs); member.rank = 0; });
      const byOrder = [...links.values()].sort((a, b) => a[0].order - b[0].order);
      byOrder.forEach(([from, to]) => { to.rank = Math.max(to.rank, from.rank + 1); });
      const first = new Map();  // what reads nothing sits just above its first reader
      byOrder.forEach(([from, to]) => first.set(from, Math.min(first.get(from) ?? Infinity, to.rank)));
      members.forEach((member) => { if (member.source && first.has(member)) member.rank = first.get(member) - 1; });
      const rows = [];
      members.forEach((member) => (rows[member.rank] ||= []).push(member));
      const lines = rows.filter(Boolean).flatMap((row) => Array.from({ length: Math.ceil(row.length / 6) }, (_, index) => row.slice(6 * index, 6 * index + 6)));
      lines.forEach((line, index) => line.forEach((member) => { member.line = index; }));
      const lanes = [], spans = new Map();  // edges that skip a line, or come in below the first or leave above the last, run beside the rows
      for (const [key, [from, to]] of links) spans.set(key, [from.line, to.line]);
      for (const pair of pairs) {
        const from = memberOf(pair.from, item), to = memberOf(pair.to, item);
        if (from && !to) spans.set(`out:${from.key}`, [from.line, lines.length]);
        if (to && !from) spans.set(`in:${to.key}`, [-1, to.line]);
      }
      item.lane = new Map();
      for (const [key, [low, high]] of [...spans].sort((a, b) => a[1][1] - a[1][0] - (b[1][1] - b[1][0]))) {
        if (high - low === 1) continue;
        let lane = lanes.findIndex((taken) => taken.every(([from, to]) => high <= from || low >= to));
        if (lane < 0) lane = lanes.length < 8 ? lanes.push([]) - 1 : 7;
        lanes[lane].push([low, high]);
        item.lane.set(key, lane);
      }
      const inner = Math.max(...lines.map((line) => line.reduce((sum, member) => sum + member.w + GAP, -GAP)), 40);
      const head = item === root ? 0 : HEAD;
      item.title = item.name;
      item.headRoom = item === root ? 0 : width(item.name, `600 12.5px ${sans}`) + 130;
      const side = lanes.length ? lanes.length * LANE + 6 : PAD;
      item.w = Math.max(inner + PAD + side, item.headRoom);
      item.content = item.w - side;
      item.h = head + PAD;
      for (const line of lines) {
        const tall = Math.max(...line.map((member) => member.h));
        let x = PAD + (item.content - PAD - line.reduce((sum, member) => sum + member.w + GAP, -GAP)) / 2;
        for (const member of line) { member.dx = x; member.dy = item.h; x += member.w + GAP; }
        item.h += tall + GAP;
      }
      item.h += PAD - GAP;
    }
    const memberOf = (item, ancestor) => { while (item && item.parent !== ancestor) item = item.parent; return item; };
    function place(item, x, y) { item.x = x; item.y = y; if (item.module && open.has(item.key)) item.children.forEach((child) => place(child, x + child.dx, y + child.dy)); }

    function make(name, attributes, text) {
      const element = document.createElementNS(SVG, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      return element;
    }
    function draw() {
      const pairs = new Map();
      for (const edge of graph.edges) {
        const from = visible(leafOf.get(edge.source)), to = visible(leafOf.get(edge.target));
        if (from === to) continue;
        const key = from.key + "→" + to.key;
        if (!pairs.has(key)) pairs.set(key, { from, to, edges: [] });
        pairs.get(key).edges.push(edge);
      }
      layout(root, [...pairs.values()]);
      place(root, 0, 0);
      const svg = make("svg", { width: root.w, height: root.h, viewBox: `0 0 ${root.w} ${root.h}` });
      if (fit) { const scale = Math.min(1, (host.clientWidth - 4) / root.w); svg.setAttribute("width", root.w * scale); svg.setAttribute("height", root.h * scale); }
      const marker = make("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto-start-reverse" });
      marker.append(make("path", { d: "M0 0L8 4L0 8z", fill: style("--soft"), "fill-opacity": ".7" }));
      const defs = make("defs", {});
      defs.append(marker);
      const frames = make("g", {}), edges = make("g", {}), boxes = make("g", {});
      svg.append(defs, frames, edges, boxes);
      drawn = 0;
      (function paint(item) {
        if (item.module && open.has(item.key)) {
          if (item !== root) frames.append(frame(item));
          item.children.forEach(paint);
        } else {
          drawn += 1;
          boxes.append(box(item));
        }
      })(root);
      for (const pair of pairs.values()) {
        const path = make("path", { class: "edge", d: route(pair.from, pair.to), "marker-end": "url(#arrow)" });
        path.append(make("title", {}, pair.edges.slice(0, 6).map((edge) => `${edge.space || ""} ${edge.group ? "· " + edge.group : ""}`).join("\n")));
        path.dataset.from = pair.from.key;
        path.dataset.to = pair.to.key;
        edges.append(path);
      }
      host.replaceChildren(svg);
      counter.textContent = `${drawn} boxes for ${graph.nodes.length} operators`;
      if (chosen) choose(chosen, false);
    }
    function route(from, to) {
      let common = from.parent;
      while (!memberOf(to, common)) common = common.parent;
      const a = memberOf(from, common), b = memberOf(to, common);
      const sx = from.x + from.w / 2, sy = from.y + from.h, tx = to.x + to.w / 2, ty = to.y;
      const tracks = [[common, `${a.key}→${b.key}`]];
      for (let item = from; item !== a; item = item.parent) tracks.push([item.parent, `out:${item.key}`]);
      for (let item = to; item !== b; item = item.parent) tracks.push([item.parent, `in:${item.key}`]);
      const xs = tracks.filter(([item, key]) => item.lane.has(key)).map(([item, key]) => item.x + item.content + LANE * (item.lane.get(key) + 0.5));
      if (!xs.length) { const bend = Math.max(12, Math.min(60, Math.abs(ty - sy) / 2)); return `M${sx} ${sy}C${sx} ${sy + bend} ${tx} ${ty - bend} ${tx} ${ty}`; }
      const x = Math.max(...xs), sr = from.x + (from.w + from.boxWidth) / 2, my = from.y + from.boxHeight / 2;
      const tr = to.x + (to.w + to.boxWidth) / 2, ey = to.y + to.boxHeight / 2, r = Math.min(8, Math.abs(ey - my) / 2);
      return `M${sr} ${my}L${x - r} ${my}Q${x} ${my} ${x} ${my + r}L${x} ${ey - r}Q${x} ${ey} ${x - r} ${ey}L${tr} ${ey}`;
    }
    function pressable(group, label, action) {
      group.setAttribute("tabindex", 0);
      group.setAttribute("role", "button");
      group.setAttribute("aria-label", label);
      group.addEventListener("click", (event) => { event.stopPropagation(); action(); });
      group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); action(); } });
      return group;
    }
    function toggle(item, x, y) {
      const isOpen = open.has(item.key);
      const group = pressable(make("g", { class: "toggle", "data-key": item.key }), `${isOpen ? "close" : "open"} ${item.path}`, () => {
        isOpen ? open.delete(item.key) : open.add(item.key);
        draw();
        [...host.querySelectorAll(".toggle")].find((element) => element.dataset.key === item.key)?.focus({ preventScroll: true });
      });
      group.append(make("circle", { cx: x, cy: y, r: 8.5 }), make("text", { x, y: y + 4.3 }, isOpen ? "−" : "+"));
      return group;
    }
    function stripe(item, x, y, tall) {
      const kinds = [...new Set(found(item).map((s) => s.kind))], group = make("g", {});
      kinds.forEach((kind, index) => group.append(make("rect", { x, y: y + (tall * index) / kinds.length, width: 5, height: tall / kinds.length, fill: graph.colours[kind] || "#888" })));
      return group;
    }
    function box(item) {
      const x = item.x + (item.w - item.boxWidth) / 2, y = item.y, w = item.boxWidth, h = item.boxHeight;
      const group = pressable(make("g", { class: "item", "data-key": item.key }), [item.path, item.name, item.sub, item.dimText, item.lostText].filter(Boolean).join(", "), () => choose(item));
      const right = x + w - (item.module ? 26 : 10);
      group.append(make("rect", { class: "box", x, y, width: w, height: h, rx: 7 }), stripe(item, x + 4, y + 5, h - 10));
      group.append(make("text", { x: x + 16, y: y + (item.sub || item.lostText ? 17 : 19.5), "font-weight": item.module ? 600 : 400 }, item.title));
      if (item.sub) group.append(make("text", { class: "sub", x: x + 16, y: y + 33 }, item.sub));
      if (item.dimText) group.append(make("text", { class: "dim", x: right, y: y + (item.sub || item.lostText ? 17 : 19.5), "text-anchor": "end" }, item.dimText));
      if (item.lostText) group.append(make("text", { class: "dim hurt", x: right, y: y + 33, "text-anchor": "end" }, item.lostText));
      if (item.label) group.append(make("text", { class: "space" + (item.spaces.some((space) => space[1]) ? " acts" : ""), x: item.x + item.w / 2, y: y + h + 12, "text-anchor": "middle" }, item.label));
      if (item.module) group.append(toggle(item, x + w - 13, y + h / 2));
      return group;
    }
    function frame(item) {
      const group = pressable(make("g", { class: "item", "data-key": item.key }), `module ${item.path}`, () => choose(item));
      group.append(make("rect", { class: "frame", x: item.x, y: item.y, width: item.w, height: item.h, rx: 9 }));
      const dims = found(item).reduce((sum, s) => sum + s.dim, 0);
      group.append(make("text", { x: item.x + 30, y: item.y + 18, "font-weight": 600 }, item.title));
      if (dims) group.append(make("text", { class: "dim", x: item.x + 40 + width(item.title, `600 12.5px ${sans}`), y: item.y + 18 }, `dim ${say(dims)}`));
      group.append(toggle(item, item.x + 15, item.y + 14));
      return group;
    }
    function choose(item, report = true) {
      chosen = item;
      host.querySelectorAll(".item").forEach((element) => element.classList.toggle("chosen", element.dataset.key === item.key));
      host.querySelectorAll(".edge").forEach((element) => element.classList.toggle("hot", element.dataset.from === item.key || element.dataset.to === item.key));
      if (report) describe(item);
    }
    function describe(item) {
      const parts = [];
      const add = (tag, text) => { const element = document.createElement(tag); element.textContent = text; parts.push(element); return element; };
      const list = (title, texts, limit = 14) => {
        if (!texts.length) return;
        add("h4", title);
        const element = add("ul", "");
        texts.slice(0, limit).forEach((text) => { const row = document.createElement("li"); row.textContent = text; element.append(row); });
        if (texts.length > limit) { const row = document.createElement("li"); row.textContent = `and ${texts.length - limit} more`; element.append(row); }
      };
      add("h3", item.name);
      if (item.path) { const code = document.createElement("code"); code.textContent = item.path; parts.push(code); }
      list("Symmetries", found(item).map((s) => `${s.name} · ${s.group}${s.dim ? ` · dim ${say(s.dim)}` : ""}${s.where === item.path ? "" : ` (${s.where})`}`));
      list("Collapse", hurt(item).map((c) => `${c.count} of ${c.of} ${c.kind} (${c.where})`));
      list("Parameters", item.nodes.flatMap((node) => node.params || []));
      list("Spaces it writes to", (item.spaces || []).map((space) => space[0]));
      list("Operators", item.module ? item.nodes.map((node) => `${node.label || node.op}${node.op && node.op !== node.label ? ` (${node.op})` : ""}`) : [item.node.op]);
      detail.replaceChildren(...parts);
    }
    const all = [...modules.values()].filter((item) => item !== root).map((item) => item.key);
    document.getElementById("net-open").addEventListener("click", () => { all.forEach((key) => open.add(key)); draw(); });
    document.getElementById("net-close").addEventListener("click", () => { all.forEach((key) => open.delete(key)); draw(); });
    document.getElementById("net-fit").addEventListener("click", (event) => { fit = !fit; event.currentTarget.setAttribute("aria-pressed", fit); draw(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    draw();
    const start = [...root.nodes].length ? root.children.find((child) => child.module) || root.children[0] : null;
    if (start) choose(start);
    return { count: () => drawn };
  }

  function topological(graph) {
    const waiting = new Map(graph.nodes.map((node) => [node.id, 0])), readers = new Map(graph.nodes.map((node) => [node.id, []]));
    for (const edge of graph.edges) { waiting.set(edge.target, waiting.get(edge.target) + 1); readers.get(edge.source).push(edge.target); }
    const place = new Map(graph.nodes.map((node, index) => [node.id, index]));
    if (graph.edges.every((edge) => place.get(edge.source) < place.get(edge.target))) return place;
    const order = new Map(), ready = graph.nodes.filter((node) => !waiting.get(node.id)).map((node) => node.id);
    for (let id = ready.shift(); id !== undefined; id = ready.shift()) {
      order.set(id, order.size);
      for (const reader of readers.get(id)) { waiting.set(reader, waiting.get(reader) - 1); if (!waiting.get(reader)) ready.push(reader); }
    }
    graph.nodes.forEach((node) => { if (!order.has(node.id)) order.set(node.id, order.size); });
    return order;
  }

  page.selftest((result) => {
    if (!net) return;
    result.boxesAtFirst = net.count();
    document.getElementById("net-open").click();
    result.boxesOpen = net.count();
    document.getElementById("net-close").click();
    result.boxesClosed = net.count();
    document.querySelector("#net .item").dispatchEvent(new MouseEvent("click", { bubbles: true }));
    result.detail = document.getElementById("net-detail").textContent.length > 0;
  });
})();
