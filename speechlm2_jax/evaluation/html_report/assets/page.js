"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const list = byId("rows");
  const rows = [...list.children];
  const menus = [...document.querySelectorAll("select.menu")];
  const unit = byId("count").dataset.unit;
  const bars = [...document.querySelectorAll(".bar")];
  let current = null;

  // Filters and order ----------------------------------------------------------------------

  const number = (name) => (row) => Number(row.dataset[name]);
  const by = (key, sign) => (a, b) => sign * (key(a) - key(b));
  const orders = {
    worst: by(number("order"), 1),
    best: by(number("order"), -1),
    longest: by(number("duration"), -1),
    shortest: by(number("duration"), 1),
    input: by(number("index"), 1),
  };

  function fits(row, words, chosen, onlyWrong) {
    if (onlyWrong && row.dataset.errors === "0") return false;
    for (const [kind, value] of chosen) {
      const unseen = kind === "voice" && value === "*unseen*";
      if (unseen ? row.dataset.unseen !== "yes" : row.dataset[kind] !== value) return false;
    }
    return words.every((word) => row.dataset.search.includes(word));
  }

  function filter() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = menus.filter((menu) => menu.value).map((menu) => [menu.id, menu.value]);
    const onlyWrong = byId("wrong").checked;
    let shown = 0;
    for (const row of rows) {
      row.hidden = !fits(row, words, chosen, onlyWrong);
      shown += !row.hidden;
    }
    for (const bar of bars) {
      const menu = byId(bar.dataset.kind);
      bar.setAttribute("aria-pressed", String(menu !== null && menu.value === bar.dataset.value));
    }
    byId("count").value =
      shown === rows.length ? `${shown} ${unit}` : `${shown} of ${rows.length} ${unit}`;
    byId("empty").hidden = shown > 0;
  }

  function sort() {
    list.append(...rows.sort(orders[byId("sort").value]));
  }

  function showAll() {
    for (const menu of menus) menu.value = "";
    byId("search").value = "";
    byId("wrong").checked = false;
    filter();
  }

  for (const menu of menus) menu.addEventListener("change", filter);
  // Escape and the box's own cross empty it, which some browsers tell by "search" alone
  for (const kind of ["input", "search", "change"]) byId("search").addEventListener(kind, filter);
  byId("wrong").addEventListener("change", filter);
  byId("sort").addEventListener("change", sort);
  byId("reset").addEventListener("click", showAll);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  for (const bar of bars) {
    bar.addEventListener("click", () => {
      const menu = byId(bar.dataset.kind);
      menu.value = menu.value === bar.dataset.value ? "" : bar.dataset.value;
      filter();
    });
  }

  // Playing --------------------------------------------------------------------------------

  const playersOf = (row) => [...row.querySelectorAll("audio")];
  const audioOf = (row) => row.querySelector("audio.chosen") ?? row.querySelector("audio");
  // a row with several players has one axis of time for all of them
  const spanOf = (row, audio) => Number(row.dataset.span) || audio.duration || 1;

  function follow(row) {
    const audio = audioOf(row);
    const head = row.querySelector(".head");
    head.style.left = `${(100 * audio.currentTime) / spanOf(row, audio)}%`;
    if (!audio.paused) requestAnimationFrame(() => follow(row));
  }

  function playFrom(row, time, audio = audioOf(row)) {
    const start = () => {
      audio.currentTime = Math.min(time(audio), audio.duration);
      audio.play();
    };
    if (audio.readyState > 0) return start();
    audio.addEventListener("loadedmetadata", start, { once: true });
    audio.preload = "auto";
    audio.load();
  }

  // media events do not bubble, hence the capturing listeners
  list.addEventListener("play", (event) => {
    for (const other of list.querySelectorAll(".playing audio")) {
      if (other !== event.target) other.pause();
    }
    const row = event.target.closest(".row");
    for (const player of playersOf(row)) player.classList.toggle("chosen", player === event.target);
    row.classList.add("playing");
    row.classList.remove("paused");
    choose(row);
    follow(row);
  }, true);
  list.addEventListener("pause", (event) => {
    const row = event.target.closest(".row");
    if (playersOf(row).some((player) => !player.paused)) return; // another took over
    row.classList.remove("playing");
    row.classList.toggle("paused", !event.target.ended);
  }, true);
  list.addEventListener("seeked", (event) => follow(event.target.closest(".row")), true);
  list.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row === null) return;
    choose(row);
    const picture = event.target.closest(".picture");
    if (picture === null) return;
    const word = event.target.closest("[data-at]");
    const box = (picture.querySelector(".track") ?? picture).getBoundingClientRect();
    const fraction = Math.max(event.clientX - box.left, 0) / box.width;
    playFrom(row, (audio) => word ? Number(word.dataset.at) : fraction * spanOf(row, audio));
  });

  // lengths become visible as rows come near; hundreds of players at once would be too many
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const audio of playersOf(entry.target)) audio.preload = "metadata";
      near.unobserve(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const row of rows) near.observe(row);

  // Keys -----------------------------------------------------------------------------------

  function choose(row) {
    if (current !== null) current.classList.remove("current");
    current = row;
    row.classList.add("current");
  }

  function move(by) {
    const shown = [...list.children].filter((row) => !row.hidden);
    if (shown.length === 0) return;
    const place = shown.indexOf(current);
    const next = place < 0 ? 0 : Math.min(Math.max(place + by, 0), shown.length - 1);
    choose(shown[next]);
    shown[next].focus({ preventScroll: true });
    shown[next].scrollIntoView({ block: "nearest" });
  }

  function toggle() {
    if (current === null || current.hidden) move(0);
    const audio = current === null ? null : audioOf(current);
    if (audio === null) return;
    if (audio.paused) audio.play();
    else audio.pause();
  }

  function change(side) {
    const player = current?.querySelector(`audio[data-side="${side}"]`);
    if (!player) return;
    const now = audioOf(current).currentTime;
    playFrom(current, () => now, player);
  }

  const keys = {
    b: () => change("both"),
    u: () => change("user"),
    a: () => change("agent"),
    j: () => move(1),
    k: () => move(-1),
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    " ": toggle,
    "/": () => byId("search").focus(),
  };
  function leave(control) {
    if (control === byId("search")) {
      control.value = ""; // as browsers do it, after this event
      filter();
    }
    control.blur();
  }
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea, button, summary, audio");
    if (event.key === "Escape" && typing !== null) leave(typing);
    if (typing !== null || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = keys[event.key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  });

  // Page -----------------------------------------------------------------------------------

  byId("theme").addEventListener("click", () => {
    const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
  });
  addEventListener("beforeprint", () => {
    for (const image of list.querySelectorAll("img")) image.loading = "eager";
  });
  filter();
})();
