(() => {
  const [live, page] = [document.getElementById("live"), document.getElementById("page")];
  const status = document.createElement("p");
  status.className = "muted";
  status.id = "connection";
  status.textContent = "Reading the runs …";
  live.before(status);
  let [strip, shown] = ["", ""];
  // What the reader opened, sorted or brought out survives a renewal.
  const renew = (place, html) => {
    const summaries = () => [...place.querySelectorAll("details")].map((one) => [one.querySelector("summary").textContent, one]);
    const open = new Map(summaries().map(([name, one]) => [name, one.open]));
    const sorted = [...place.querySelectorAll("table")].map((one, k) => {
      const header = one.querySelector("th[aria-sort]");
      return header && [k, header.cellIndex, header.getAttribute("aria-sort")];
    });
    const lit = [...place.querySelectorAll("button[aria-pressed]")].findIndex((one) => one.getAttribute("aria-pressed") === "true");
    place.innerHTML = html; // escaped by the server; this page's policy runs no other script
    for (const [name, one] of summaries()) if (open.has(name)) one.open = open.get(name);
    const tables = place.querySelectorAll("table");
    for (const found of sorted) {
      const header = found && tables[found[0]] && tables[found[0]].tHead.rows[0].cells[found[1]];
      for (let press = 0; header && press < 2 && header.getAttribute("aria-sort") !== found[2]; press++) header.querySelector("button").click();
    }
    if (lit >= 0) place.querySelectorAll("button[aria-pressed]")[lit]?.click();
  };
  const beat = async () => {
    try {
      const now = await fetch("live", { cache: "no-store" });
      if (!now.ok) throw new Error(now.status);
      const html = await now.text();
      if (html !== strip) { renew(live, html); strip = html; }
      if (now.headers.get("X-Version") !== shown) {
        const body = await fetch("body", { cache: "no-store" });
        if (body.ok && body.headers.get("X-Version") !== shown) {
          renew(page, await body.text());
          shown = body.headers.get("X-Version");
        }
      }
      status.textContent = "Live: renewed every two seconds.";
    } catch {
      status.textContent = "No answer from fedfuse watch; what you see is the last it said.";
    }
    setTimeout(beat, 2000);
  };
  beat();
})();
