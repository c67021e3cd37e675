// Votes of a blind comparison: kept in the browser, saved to a file, opened at the end. Needs blind_count.js.

(() => {
  "use strict";

  const $ = (id) => document.getElementById(id);
  const { page, sealed } = $("ballots").dataset;
  const articles = [...document.querySelectorAll(".pair")];
  const pairs = articles.map((article) => ({ kind: article.dataset.kind, same: "same" in article.dataset }));
  const open = pairs.filter((pair) => !pair.same).length;
  const place = `lowbit-blind-${page}`;
  let state = { votes: {}, opened: false };

  const say = (words) => { $("said").textContent = words; };

  const keep = () => {
    try {
      localStorage.setItem(place, JSON.stringify({ page, ...state }));
    } catch {
      $("kept").textContent = "This browser keeps no votes of a file: save them before you close the page.";
    }
  };

  const show = () => {
    articles.forEach((article, index) => {
      for (const button of article.querySelectorAll("[data-vote]")) {
        button.setAttribute("aria-pressed", String(state.votes[index] === button.dataset.vote));
        button.disabled = state.opened;
      }
    });
    const voted = Object.keys(state.votes).length;
    $("progress").max = Math.max(open, 1);
    $("progress").value = open ? voted : 1;
    $("standing").textContent = `${voted} of ${open} voted`;
    $("next").hidden = voted === open;
    $("open").hidden = state.opened;
  };

  const row = (name, counts) => {
    const cells = [counts.a, counts.b, counts.tie, counts.bad, counts.same, counts.none];
    const line = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    line.append(head, ...cells.map((count) => {
      const cell = document.createElement("td");
      cell.className = "n";
      cell.textContent = count;
      return cell;
    }));
    return line;
  };

  const unblind = () => {
    let key;
    try {
      key = unseal(sealed, page);
    } catch {
      say("The key of this page is damaged, so the votes cannot be opened.");
      return;
    }
    state.opened = true;
    const found = tally(state.votes, key.order, pairs);
    $("verdict").textContent = sentence(found, key.a, key.b);
    $("wins-a").textContent = `${key.a} wins`;
    $("wins-b").textContent = `${key.b} wins`;
    const kinds = Object.entries(found.kinds);
    $("by-kind").replaceChildren(
      ...(kinds.length > 1 ? kinds.map(([kind, counts]) => row(kind || "others", counts)) : []), row("all", found.all),
    );
    articles.forEach((article, index) => {
      const other = key.order[index] === "a" ? "b" : "a";
      const [left, right] = article.querySelectorAll(".whose");
      left.textContent = `: ${key[key.order[index]]}`;
      right.textContent = `: ${key[other]}`;
    });
    if (key.judge) {
      const both = Object.keys(state.votes).filter((index) => ["a", "b"].includes(key.judge.verdicts[index]) &&
        ["a", "b"].includes(winner(state.votes[index], key.order[index])));
      const agreed = both.filter((index) => winner(state.votes[index], key.order[index]) === key.judge.verdicts[index]);
      $("judge").textContent = `Judge ${key.judge.name}: ${key.judge.sentence}. ` +
        (both.length ? `Where you and it both saw a winner, you agreed on ${agreed.length} of ${both.length}.` : "");
    }
    $("notes").replaceChildren(...[`The order was drawn with seed ${key.seed}.`, ...key.notes].map((note) => {
      const item = document.createElement("li");
      item.textContent = note;
      return item;
    }));
    $("result").hidden = false;
    dispatchEvent(new Event("resize")); // its table may be wider than the screen
    keep();
    show();
  };

  articles.forEach((article, index) => {
    article.addEventListener("click", (event) => {
      const vote = event.target.dataset?.vote;
      if (vote === undefined || state.opened) return;
      if (state.votes[index] === vote) delete state.votes[index]; // a second click takes it back
      else state.votes[index] = vote;
      keep();
      show();
    });
  });

  $("next").addEventListener("click", () => {
    const next = articles.find((_, index) => !pairs[index].same && state.votes[index] === undefined);
    next?.scrollIntoView({ block: "start" });
    next?.querySelector("[data-vote]").focus({ preventScroll: true });
  });

  $("open").addEventListener("click", () => {
    const missing = open - Object.keys(state.votes).length;
    const warning = `${missing} of ${open} pairs have no vote yet. Once opened, votes cannot be changed. Open them?`;
    if (missing === 0 || confirm(warning)) {
      unblind();
      $("result").scrollIntoView();
    }
  });

  $("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify({ page, ...state }, null, 2)]));
    link.download = `votes-${page}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  $("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    try {
      const loaded = readVotes(await file.text(), page, pairs);
      // whoever has seen which model is which has no vote any more
      state = { votes: loaded.votes, opened: state.opened || loaded.opened };
      say(`${Object.keys(state.votes).length} votes loaded.`);
      keep();
      show();
      if (state.opened) unblind();
    } catch (error) {
      say(error.message);
    }
  });

  try {
    const text = localStorage.getItem(place);
    if (text !== null) state = readVotes(text, page, pairs);
  } catch {
    say("The votes that this browser kept cannot be read; it begins anew.");
  }
  show();
  if (state.opened) unblind();
})();
