// What is reckoned on the page of a blind comparison, apart from the page itself.

// The opposite of `seal` in lowbit/blind/page.py: base64, XOR with xorshift32 from the FNV-1a hash of the page's name.
const unseal = (sealed, page) => {
  let state = 2166136261;
  for (const byte of new TextEncoder().encode(page)) state = Math.imul(state ^ byte, 16777619) >>> 0;
  const text = Array.from(atob(sealed), (char) => {
    state = (state ^ (state << 13)) >>> 0;
    state = (state ^ (state >>> 17)) >>> 0;
    state = (state ^ (state << 5)) >>> 0;
    return String.fromCharCode(char.charCodeAt(0) ^ (state & 255));
  });
  return JSON.parse(text.join(""));
};

// Two-sided exact p of so many wins against so many: 2 · P(X ≤ the smaller), X binomial with p = ½; at most 1.
const signTest = (wins, losses) => {
  const n = wins + losses;
  let term = -n * Math.LN2; // log of C(n, 0) / 2ⁿ
  let tail = 0;
  for (let k = 0; k <= Math.min(wins, losses); k++) {
    tail += Math.exp(term);
    term += Math.log((n - k) / (k + 1));
  }
  return Math.min(1, 2 * tail);
};

const VOTES = ["left", "right", "tie", "bad"];

// Who won a pair: "a", "b", "tie", "bad"; "none" without a vote.
const winner = (vote, left) => {
  if (vote === undefined) return "none";
  if (vote !== "left" && vote !== "right") return vote;
  return vote === "left" ? left : left === "a" ? "b" : "a";
};

// Counts of all pairs and by kind. votes: place → vote; order: whose answer is on the left of each pair, "abba…";
// pairs: [{kind, same}].
const tally = (votes, order, pairs) => {
  const empty = () => ({ a: 0, b: 0, tie: 0, bad: 0, same: 0, none: 0 });
  const kinds = {};
  const all = empty();
  pairs.forEach(({ kind, same }, place) => {
    const won = same ? "same" : winner(votes[place], order[place]);
    kinds[kind] ??= empty();
    kinds[kind][won] += 1;
    all[won] += 1;
  });
  return { all, kinds, p: signTest(all.a, all.b) };
};

// The votes of a saved file; an Error in words where it is none, or that of another page.
const readVotes = (text, page, pairs) => {
  let saved;
  try {
    saved = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (saved?.page === undefined || typeof saved.votes !== "object" || saved.votes === null) {
    throw new Error("This file holds no votes.");
  }
  if (saved.page !== page) throw new Error("These are votes on another page.");
  const votes = {};
  for (const [place, vote] of Object.entries(saved.votes)) {
    if (!(Number(place) in pairs) || pairs[place].same || !VOTES.includes(vote)) {
      throw new Error(`This file has a vote that cannot be: ${String(vote).slice(0, 20)} on ${place.slice(0, 20)}.`);
    }
    votes[place] = vote;
  }
  return { votes, opened: saved.opened === true };
};

// The result in a sentence.
const sentence = ({ all, p }, a, b) => {
  if (all.a + all.b === 0) return "Nobody won a pair.";
  const more = all.a > all.b ? a : b;
  const verdict = p > 0.05 ? "no preference that chance would not explain" : `${more} is preferred`;
  return `Wins: ${all.a} for ${a}, ${all.b} for ${b}; ties: ${all.tie}; both bad: ${all.bad}. ` +
    `Sign test: p = ${p < 0.001 ? p.toExponential(1) : p.toFixed(3)}, ${verdict}.`;
};
