// Walking with the keys, and pages that stay current. Everything works without this file.
"use strict";

// Arrow keys walk the rows of what is marked with data-walk; → or Enter opens, ← goes back.
function walkers() {
  return [...document.querySelectorAll("[data-walk] a[href], [data-walk] summary")].filter(
    (item) => item.offsetParent !== null && (item.tagName === "SUMMARY" || item.closest("[data-walk=row]")),
  );
}

function step(by) {
  const items = walkers();
  if (items.length === 0) return false;
  const at = items.indexOf(document.activeElement);
  const next = at < 0 ? (by > 0 ? 0 : items.length - 1) : Math.min(Math.max(at + by, 0), items.length - 1);
  items[next].focus();
  items[next].scrollIntoView({ block: "nearest" });
  return true;
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const here = document.activeElement;
  let done = true;
  if (event.key === "ArrowDown" || event.key === "j") done = step(1);
  else if (event.key === "ArrowUp" || event.key === "k") done = step(-1);
  else if (event.key === "ArrowRight" && here.matches("[data-walk] a")) here.click();
  else if (event.key === "ArrowRight" && here.matches("[data-walk] summary")) here.parentElement.open = true;
  else if (event.key === "ArrowLeft" && here.matches("[data-walk] summary") && here.parentElement.open) here.parentElement.open = false;
  else {
    const target = [...document.querySelectorAll("[data-key]")].find((item) => item.dataset.key === event.key);
    if (!target) return;
    if (target.matches("input")) target.focus();
    else target.click();
  }
  if (done) event.preventDefault();
});

// A session's page opened at a turn begins there.
if (location.hash.length > 1) {
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.querySelector("a")?.focus();
}

// A part marked with data-live is fetched again after events, at most once in half a second.
const live = document.querySelector("[data-live]");
if (live) {
  const note = document.getElementById("live");
  let waiting = false;
  const refresh = async () => {
    waiting = false;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById(live.id);
      if (fresh) live.replaceChildren(...fresh.childNodes);
      note.textContent = `Live. As of ${new Date().toLocaleTimeString()}.`;
    } catch (error) {
      note.textContent = `Not current: ${error.message}. Trying again when something happens.`;
    }
  };
  const soon = () => {
    if (!waiting) {
      waiting = true;
      setTimeout(refresh, 500);
    }
  };
  const events = new EventSource(live.dataset.live);
  events.onopen = soon;
  events.onerror = () => {
    note.textContent = "Connection lost; trying again.";
  };
  // A worker's events are named after the state that it is in now.
  const states = ["starting", "ready", "waiting", "draining", "backoff", "crash-looping", "stopped"];
  const others = ["node.joined", "node.restarted", "node.left", "agent.deployed", "agent.deleted", "log.healing", "log.healed",
    "turn.started", "turn.ended"];
  for (const name of [...states.map((state) => `worker.${state}`), ...others]) events.addEventListener(name, soon);
  events.onmessage = soon;
}
