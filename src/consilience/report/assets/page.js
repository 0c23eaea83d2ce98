(function () {
'use strict';
const $ = (s, r) => (r || document).querySelector(s), $$ = (s, r) => [...(r || document).querySelectorAll(s)];
const D = JSON.parse($('#data').textContent), METHODS = D.methods, S = D.scale;
const method = Object.fromEntries(METHODS.map(m => [m.id, m]));
const MINUS = '\u2212';
const state = {x: 'round', y: (D.curves.measures[0] || {}).key, pick: 'last', who: 'last', fs: 0, bands: true, hidden: new Set(), focus: null, traced: null, cursor: 1};
let printing = false;

/* ---------- words ---------- */
const esc = s => String(s).replace(/[&<>"]/g, c => ({'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'}[c]));
const num = (v, d = S.digits) => (v < 0 && +Math.abs(v).toFixed(d) ? MINUS : '') + Math.abs(v).toFixed(d);
const signed = (v, d = S.digits) => (v > 0 && +v.toFixed(d) ? '+' : '') + num(v, d);
const shown = () => METHODS.filter(m => !state.hidden.has(m.id));
const colour = m => m.ref || m.slot >= D.slots ? 'var(--ref)' : `var(--m${m.slot + 1})`;
const dash = m => m.ref === 'local' ? '6 4' : m.ref ? '1.5 3.5' : '';
const strong = m => m.best ? ' font-weight="700"' : '';

/* ---------- drawing ---------- */
const WIDE = 680;
const width = el => printing ? WIDE : Math.max(280, el.clientWidth);
const frame = (el, w, h, inner, label) => {
  el.innerHTML = `<svg viewBox="0 0 ${w} ${h.toFixed(1)}" width="100%" role="img" aria-label="${esc(label)}">${inner}</svg>`;
};
const text = (x, y, t, more = '') => `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${more}>${t}</text>`;
const line = (x1, y1, x2, y2, more) => `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" ${more}/>`;
const group = (m, inner) => `<g class="series" data-m="${esc(m.id)}">${inner}</g>`;
function mark(m, x, y, r) { /* the shape is a second channel beside the hue */
  const c = colour(m), q = r * 1.15, move = `transform="translate(${x.toFixed(1)} ${y.toFixed(1)})"`;
  if (m.ref) {
    const open = `${move} fill="var(--bg)" stroke="${c}" stroke-width="1.8"`, s = r - .8;
    return m.ref === 'local' ? `<circle r="${r - .6}" ${open}/>` : `<rect x="${-s}" y="${-s}" width="${2 * s}" height="${2 * s}" ${open}/>`;
  }
  const plus = a => { const b = r * 1.1, k = b - a; return `M${-a} ${-b}h${2 * a}v${k}h${k}v${2 * a}h${-k}v${k}h${-2 * a}v${-k}h${-k}v${-2 * a}h${k}z`; };
  const fill = `fill="${c}" stroke="var(--bg)" stroke-width="1"`, path = d => `<path d="${d}" ${move} ${fill}/>`;
  switch (m.slot % 8) {
    case 0: return `<circle r="${r}" ${move} ${fill}/>`;
    case 1: return path(`M${-r * .9} ${-r * .9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`);
    case 2: return path(`M0 ${-q}L${q} ${q * .8}L${-q} ${q * .8}z`);
    case 3: return path(`M0 ${-q * 1.1}L${q * 1.1} 0L0 ${q * 1.1}L${-q * 1.1} 0z`);
    case 4: return path(`M0 ${q}L${q} ${-q * .8}L${-q} ${-q * .8}z`);
    case 5: return path(plus(r * .38));
    case 6: return path([0, 1, 2, 3, 4, 5].map(i => `${i ? 'L' : 'M'}${(q * Math.cos(i * Math.PI / 3)).toFixed(2)} ${(q * Math.sin(i * Math.PI / 3)).toFixed(2)}`).join('') + 'z');
    default: return `<g ${move}><path transform="rotate(45)" d="${plus(r * .36)}" ${fill}/></g>`;
  }
}
const swatch = m => `<svg class="sw" width="14" height="14" aria-hidden="true">${mark(m, 7, 7, 5)}</svg>`;
function ticks(a, b, n) {
  const raw = (b - a) / Math.max(1, n);
  if (!(raw > 0)) return [a];
  const e = 10 ** Math.floor(Math.log10(raw)), f = raw / e, step = (f < 1.5 ? 1 : f < 3 ? 2 : f < 7 ? 5 : 10) * e, out = [];
  for (let v = Math.ceil(a / step - 1e-9) * step; v <= b + 1e-9 * step; v += step) out.push(+v.toFixed(10));
  return out;
}
const digitsOf = list => list.length < 2 ? S.digits : Math.max(0, Math.ceil(-Math.log10(list[1] - list[0]) - 1e-9));
function spread(items, gap, low, high) { /* push labels apart, keeping their order */
  items.sort((a, b) => a.y - b.y);
  const room = Math.min(gap, (high - low) / Math.max(1, items.length - 1));
  items.forEach((t, i) => { t.ly = Math.max(t.y, i ? items[i - 1].ly + room : low); });
  for (let i = items.length - 1, top = high; i >= 0; i--) { items[i].ly = Math.min(items[i].ly, top); top = items[i].ly - room; }
}

/* ---------- which methods are shown ---------- */
$$('.quick').forEach(box => { box.hidden = METHODS.filter(m => !m.ref).length < 4; });
function keys() {
  $$('[data-keys]').forEach(box => {
    box.innerHTML = METHODS.map(m => `<button type="button" data-m="${esc(m.id)}" aria-pressed="${!state.hidden.has(m.id)}">${swatch(m)}${esc(m.name)}</button>`).join('');
  });
}
function emphasise(id) {
  state.focus = id;
  $$('.plot').forEach(p => {
    p.classList.toggle('emph', !!id);
    $$('.series', p).forEach(s => s.classList.toggle('on', s.dataset.m === id));
  });
}
document.addEventListener('click', e => {
  const key = e.target.closest('[data-keys] button'), quick = e.target.closest('[data-quick]');
  if (key) {
    const id = key.dataset.m;
    if (!state.hidden.delete(id)) state.hidden.add(id);
    $$('[data-keys] button').forEach(b => b.dataset.m === id && b.setAttribute('aria-pressed', !state.hidden.has(id)));
    charts();
  }
  if (quick) {
    state.hidden = new Set(quick.dataset.quick === 'all' ? [] : METHODS.filter(m => !m.ref && m.slot > 2).map(m => m.id));
    keys(); charts();
  }
});
const onKey = e => e.target.closest && e.target.closest('[data-keys] button');
['mouseover', 'focusin'].forEach(type => document.addEventListener(type, e => { const k = onKey(e); if (k && !state.hidden.has(k.dataset.m)) emphasise(k.dataset.m); }));
['mouseout', 'focusout'].forEach(type => document.addEventListener(type, e => { if (onKey(e)) emphasise(null); }));

/* ---------- learning curves ---------- */
function valueAt(row, x) {
  const X = row.x, n = X.length;
  if (x >= X[n - 1]) return row.y[n - 1];
  if (x <= X[0]) return row.y[0];
  let i = 0;
  while (X[i + 1] < x) i++;
  return row.y[i] + (x - X[i]) / (X[i + 1] - X[i] || 1) * (row.y[i + 1] - row.y[i]);
}
function yRange(rows) { /* from the means; a band that few seeds make very wide is cut, not allowed to flatten them */
  const late = rows.flatMap(r => r.y.map((v, i) => [v, r.e[i]]).slice(r.y.length > 2 ? Math.ceil(.08 * r.y.length) : 0)); /* the first steep steps may leave the picture */
  const means = late.map(p => p[0]), low = Math.min(...means), high = Math.max(...means), reach = .2 * (high - low || Math.abs(high) || 1);
  const ends = late.flatMap(([v, e]) => [v - e, v + e]);
  const pad = .03 * (high - low || reach), a = Math.max(Math.min(low, ...ends), low - reach) - pad, b = Math.min(Math.max(high, ...ends), high + reach) + pad;
  return S.lower ? [a, b] : [Math.max(0, a), Math.min(100, b)];
}
function curves() {
  const el = $('#cv');
  if (!el) return;
  const axis = D.curves.axes.find(a => a.key === state.x) || D.curves.axes[0], measure = D.curves.measures.find(m => m.key === state.y);
  const best = state.pick === 'best' && D.curves.best, of = (best ? D.curves.best : D.curves.of)[state.y], rows = [], missing = [];
  shown().forEach(m => { const c = of[m.id]; if (c) rows.push({m, x: c[axis.key], y: c.y, e: c.e}); else missing.push(m.name); });
  $('#cv-t').textContent = measure.title + (best ? ', of the round best on validation data so far' : '');
  const ends = rows.map(r => r.x[r.x.length - 1]), x1 = Math.max(...ends), seeds = D.seeds.length;
  $('#cv-s').textContent = (S.unit ? `In ${S.unit}, ` : '') + (seeds > 1 ? `${S.unit ? 'm' : 'M'}ean of ${seeds} seeds${state.bands ? ' with 95 % band' : ''}` : `${S.unit ? 'o' : 'O'}ne seed`) + '.'
    + (rows.length && yRange(rows)[0] > 0 ? ' Vertical axis does not start at 0.' : '')
    + (ends.some(v => v < .98 * x1) ? ' A dotted line carries a finished run forward.' : '') + (missing.length ? ` Not available here: ${missing.join(', ')}.` : '');
  $('.range').hidden = !rows.length;
  if (!rows.length) { el.innerHTML = '<p class="empty">None of the methods shown has this measure. Choose another or show more methods.</p>'; return; }
  const w = width(el), narrow = w < 620, h = printing ? 290 : narrow ? 330 : 460, ml = S.lower ? 46 : narrow ? 30 : 38, mt = 14, mb = 42;
  const longest = Math.max(...rows.map(r => r.m.name.length)), mr = Math.min(w * .36, 36 + longest * (rows.some(r => r.m.best) ? 7.8 : 7) + (narrow ? 0 : 44));
  const [low, high] = yRange(rows), px = v => ml + (w - ml - mr) * v / (x1 || 1), py = v => mt + (h - mt - mb) * (high - v) / (high - low);
  const yTicks = ticks(low, high, narrow ? 5 : 7), digits = digitsOf(yTicks), right = w - mr;
  let s = `<defs><clipPath id="cvc"><rect x="${ml}" y="${mt}" width="${(right - ml).toFixed(1)}" height="${h - mt - mb}"/></clipPath></defs>`;
  yTicks.forEach(t => { s += line(ml, py(t), right, py(t), 'class="gridl"') + text(ml - 7, py(t) + 4, num(t, digits), 'text-anchor="end"'); });
  s += line(ml, h - mb, right, h - mb, 'class="axisl"');
  ticks(0, x1, narrow ? 4 : 8).forEach(t => { s += line(px(t), h - mb, px(t), h - mb + 4, 'class="axisl"') + text(px(t), h - mb + 18, t.toLocaleString('en'), 'text-anchor="middle"'); });
  s += text(ml + (right - ml) / 2, h - 6, esc(axis.title), 'text-anchor="middle"');
  const cx = x1 * state.cursor, ordered = rows.filter(r => !r.m.best).concat(rows.filter(r => r.m.best)), labels = [];
  let bands = '', lines = '';
  ordered.forEach(r => {
    const c = colour(r.m), n = r.x.length, at = (v, i) => `${px(r.x[i]).toFixed(1)} ${py(v).toFixed(1)}`, ex = px(r.x[n - 1]), ey = py(r.y[n - 1]);
    if (state.bands && r.e.some(v => v > 0)) {
      const over = r.y.map((v, i) => at(v + r.e[i], i)), under = r.y.map((v, i) => at(v - r.e[i], i)).reverse();
      bands += `<path class="series" data-m="${esc(r.m.id)}" clip-path="url(#cvc)" fill="${c}" fill-opacity=".13" d="M${over.join('L')}L${under.join('L')}Z"/>`;
    }
    lines += group(r.m, `<path clip-path="url(#cvc)" fill="none" stroke="${c}" stroke-width="${r.m.best ? 3 : 1.8}" stroke-linejoin="round"${dash(r.m) ? ` stroke-dasharray="${dash(r.m)}"` : ''} d="M${r.y.map(at).join('L')}"/>`
      + (ex < right - 8 ? line(ex, ey, right, ey, `stroke="${c}" stroke-width="1" stroke-dasharray="1 4" opacity=".8"`) : '') + mark(r.m, ex, ey, 4.2));
    labels.push({m: r.m, y: ey, v: valueAt(r, cx)});
  });
  spread(labels, narrow ? 14 : 16, mt + 2, h - mb - 2);
  const fits = Math.floor((mr - 27 - (narrow ? 0 : 40)) / 6.4), cut = t => t.length > fits ? t.slice(0, Math.max(1, fits - 1)) + '…' : t;
  labels.forEach(t => {
    lines += group(t.m, `<path d="M${right + 6} ${t.y.toFixed(1)}L${right + 13} ${t.ly.toFixed(1)}" stroke="${colour(t.m)}" fill="none"/>` + mark(t.m, right + 19, t.ly, 3.6)
      + text(right + 27, t.ly + 4, esc(cut(t.m.name)), 'class="lab-ink"' + strong(t.m)) + (narrow ? '' : text(w - 2, t.ly + 4, num(t.v), 'class="lab-ink" text-anchor="end"' + strong(t.m))));
  });
  if (state.cursor < 1) {
    s += line(px(cx), mt, px(cx), h - mb, 'class="cursor"');
    rows.forEach(r => { if (cx <= r.x[r.x.length - 1]) lines += `<circle cx="${px(cx).toFixed(1)}" cy="${py(valueAt(r, cx)).toFixed(1)}" r="3" fill="var(--bg)" stroke="${colour(r.m)}" stroke-width="1.6"/>`; });
  }
  const read = rows.map(r => [r.m.name, valueAt(r, cx)]).sort((a, b) => S.lower ? a[1] - b[1] : b[1] - a[1]).map(p => `${p[0]} ${num(p[1])}`).join(', ');
  frame(el, w, h, s + bands + lines, `${measure.title} against ${axis.title}. At the end: ${rows.map(r => `${r.m.name} ${num(r.y[r.y.length - 1])}`).join(', ')}.`);
  el.dataset.from = ml / w; el.dataset.to = right / w;
  const slider = $('#cvr'), where = axis.key === 'round' ? `round ${Math.round(cx)}` : `${num(cx, axis.digits)} ${axis.unit}`.trim();
  slider.style.marginLeft = `${ml - 7}px`; slider.style.width = `${right - ml + 14}px`;
  slider.setAttribute('aria-valuetext', `${where}: ${read}`);
  $('#cvo').textContent = `at ${where}` + (narrow ? `: ${read}` : '');
}

/* ---------- one mark per client ---------- */
const DRAWN = 400; /* more marks than that in a row say less than quartiles */
const quantile = (sorted, q) => { const p = (sorted.length - 1) * q, i = Math.floor(p); return sorted[i] + (p - i) * ((sorted[i + 1] ?? sorted[i]) - sorted[i]); };
function strip() {
  const el = $('#strip');
  if (!el) return;
  const best = state.who === 'best' && D.strip.best, gain = D.strip.gain, dots = best || D.strip.dots, list = shown().filter(m => dots[m.id]);
  if (!list.length) { el.innerHTML = '<p class="empty">No method with clients is shown.</p>'; return; }
  const w = width(el), narrow = w < 620, rh = printing ? 28 : narrow ? 60 : 44, longest = Math.max(...list.map(m => m.name.length));
  const ml = narrow ? 2 : Math.max(60, 34 + 7.4 * longest), mr = narrow ? 2 : 150, mt = 26, mb = narrow ? 22 : 38, h = mt + rh * list.length + mb;
  const all = list.flatMap(m => dots[m.id].map(d => d[2])), least = Math.min(...all), most = Math.max(...all), pad = .04 * (most - least) || 1;
  const a = (gain ? Math.min(0, least) : least) - pad, b = (gain ? Math.max(0, most) : most) + pad, px = v => ml + (w - ml - mr) * (v - a) / (b - a);
  const xTicks = ticks(a, b, narrow ? 5 : 9), digits = digitsOf(xTicks);
  let s = gain ? `<rect x="${px(a)}" y="${mt}" width="${px(0) - px(a)}" height="${rh * list.length}" fill="var(--bg2)"/>` : '';
  xTicks.forEach(t => { s += (t || !gain ? line(px(t), mt, px(t), h - mb, 'class="gridl"') : '') + text(px(t), h - mb + 17, gain ? signed(t, digits) : num(t, digits), 'text-anchor="middle"'); });
  if (gain) s += (px(0) > 50 ? text(px(0) - 8, mt - 9, narrow ? 'loses' : 'loses by joining', 'text-anchor="end"') : '') + text(px(0) + 8, mt - 9, narrow ? 'gains' : 'gains by joining');
  if (!narrow) s += text(w - mr + 62, mt - 9, gain ? 'lose' : 'lowest', 'text-anchor="end"') + text(w - 2, mt - 9, gain ? 'median gain' : 'median', 'text-anchor="end"');
  const traced = [];
  list.forEach((m, i) => {
    const rows = dots[m.id].slice().sort((p, q) => p[2] - q[2]), v = rows.map(d => d[2]), y0 = mt + rh * i + (narrow ? 40 : rh / 2), losers = v.filter(x => x < 0).length, mid = quantile(v, .5);
    let row = i ? line(0, mt + rh * i, w, mt + rh * i, 'class="gridl"') : '';
    row += rows.length > DRAWN ? quartiles(v, px, y0) : marks(rows, px, y0, narrow ? 3 : 3.6, gain, traced, m);
    row += line(px(mid), y0 - 12, px(mid), y0 + 12, 'stroke="var(--ink)" stroke-width="2"');
    const first = gain ? String(losers) : num(v[0]), second = gain ? signed(mid) : num(mid);
    if (narrow) row += mark(m, 8, mt + rh * i + 12, 4.4) + text(18, mt + rh * i + 16, esc(m.name), 'class="lab-ink halo"' + strong(m)) + text(w - 2, mt + rh * i + 16, gain ? `${first} lose, median ${second}` : `lowest ${first}, median ${second}`, 'class="halo" text-anchor="end"');
    else row += mark(m, 8, y0, 5) + text(22, y0 + 5, esc(m.name), 'class="lab-ink big"' + strong(m)) + text(w - mr + 62, y0 + 5, first, 'class="lab-ink big" text-anchor="end"') + text(w - 2, y0 + 5, second, 'class="lab-ink big" text-anchor="end"');
    s += group(m, row);
  });
  if (gain) s += line(px(0), mt, px(0), h - mb, 'class="zero"');
  if (traced.length) {
    s += `<path d="M${traced.map(t => `${t.x.toFixed(1)} ${t.y.toFixed(1)}`).join('L')}" fill="none" stroke="var(--ink)" stroke-width="1.2"/>`;
    traced.forEach(t => { s += `<circle cx="${t.x.toFixed(1)}" cy="${t.y.toFixed(1)}" r="6.5" fill="none" stroke="var(--ink)" stroke-width="2"/>` + text(t.x, t.y - 10, gain ? signed(t.v) : num(t.v), 'class="lab-ink halo" text-anchor="middle" font-weight="600"'); });
  }
  if (!narrow) s += text(ml + (w - ml - mr) / 2, h - 1, gain ? `${S.points || 'difference'} over Local`.trim() : `${S.noun}${S.unit && ', ' + S.unit}`, 'text-anchor="middle"');
  frame(el, w, h, s, (gain ? 'Gain over Local per client' : `${S.noun} per client`) + (best ? ', at the round best on validation data. ' : '. ') + list.map(m => { const v = dots[m.id].map(d => d[2]).sort((p, q) => p - q); return gain ? `${m.name}: ${v.filter(x => x < 0).length} of ${v.length} lose` : `${m.name}: median ${num(quantile(v, .5))}`; }).join(', ') + '. The table below has every value.');
}
function marks(rows, px, y0, r, gain, traced, m) {
  const placed = [];
  let out = '';
  rows.forEach(([seed, client, v]) => {
    const x = px(v);
    let dy = 0;
    for (let j = 0; j < 9; j++) { /* the nearest free place above or below the row's line */
      const c = (j % 2 ? 1 : -1) * Math.ceil(j / 2) * r * 1.2;
      if (!placed.some(p => Math.hypot(p[0] - x, p[1] - c) < r * 1.8)) { dy = c; break; }
    }
    placed.push([x, dy]);
    const y = y0 + dy, id = `${seed}/${client}`, title = `<title>client ${client}${D.seeds.length > 1 ? `, seed ${seed}` : ''}: ${gain ? signed(v) : num(v)}</title>`;
    if (state.traced === id) traced.push({x, y, v, m});
    out += gain && v < 0
      ? `<path data-k="${id}" d="M${(x - r - .6).toFixed(1)} ${(y - r * .8).toFixed(1)}h${(2 * r + 1.2).toFixed(1)}l${(-r - .6).toFixed(1)} ${(r * 1.8).toFixed(1)}z" fill="var(--ink)">${title}</path>`
      : `<circle data-k="${id}" cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r}" fill="var(--fill2)" stroke="var(--fill)" stroke-width=".9">${title}</circle>`;
  });
  return out;
}
function quartiles(v, px, y) {
  const [a, b, c, d] = [.05, .25, .75, .95].map(q => px(quantile(v, q))), n = v.length;
  return line(px(v[0]), y, px(v[n - 1]), y, 'stroke="var(--fill2)" stroke-dasharray="1 3"') + line(a, y, d, y, 'stroke="var(--fill)" stroke-width="2"')
    + `<rect x="${b.toFixed(1)}" y="${y - 7}" width="${Math.max(1, c - b).toFixed(1)}" height="14" fill="var(--fill2)" stroke="var(--fill)"/>`;
}

/* ---------- the federation ---------- */
function binned(F) {
  const each = Math.ceil(F.order.length / D.rows);
  const rows = []; /* more clients than rows are averaged, neighbours with neighbours */
  for (let i = 0; i < F.order.length; i += each) {
    const of = F.order.slice(i, i + each), size = of.reduce((t, k) => t + F.sizes[k], 0) / of.length;
    rows.push({
      id: of.length > 1 ? `clients ${of.join(', ')}` : String(of[0]), size, first: of[0], unseen: of.every(k => F.unseen.includes(k)),
      counts: F.counts && F.classes.map((_, c) => of.reduce((t, k) => t + F.counts[k][c], 0) / of.length),
    });
  }
  return rows;
}
function federation() {
  const el = $('#fed');
  if (!el) return;
  const F = D.federation[state.fs], rows = binned(F), C = F.counts ? F.classes.length : 0, w = width(el), narrow = w < 560, averaged = rows.length < F.order.length;
  const rh = rows.length > 60 ? 7 : printing ? 10.5 : narrow ? 13 : Math.min(20, Math.max(14, 320 / rows.length)), grouped = F.groups && !narrow, ml = (rh < 10 ? 2 : 34) + (grouped ? 12 + 7.4 * Math.max(...F.groups.map(g => String(g).length)) : 0);
  const share = C ? (narrow ? .6 : .66) : 0, cw = C ? Math.max(3, Math.min(58, (w - ml) * share / C)) : 0, gap = C ? 22 : 0, hx = ml + cw * C + gap, rest = Math.min(420, w - hx - 46);
  const short = F.classes.map(c => narrow || c.length * 7 > cw ? (c.length > 9 ? c.slice(0, 8) + '…' : c) : c), turned = C && short.some(c => c.length * 7 > cw), mt = turned ? 16 + 6.5 * Math.max(...short.map(c => c.length)) : 26;
  const label = cw < 9 ? Math.ceil(9 / cw) : 1, biggest = Math.max(...rows.map(r => r.size), 1);
  const top = C ? Math.min(1, Math.max(.2, ...rows.map(r => Math.max(...r.counts) / Math.max(1, r.size)))) : 1;
  let s = '', y = mt, last = null;
  short.forEach((c, i) => {
    if (!C || i % label) return;
    const x = ml + cw * (i + .5);
    s += turned ? `<text transform="translate(${(x + 4).toFixed(1)} ${mt - 6}) rotate(-90)">${esc(c)}</text>` : text(x, mt - 9, esc(c), 'text-anchor="middle"');
  });
  s += text(hx, mt - 9, averaged ? 'Samples, average' : 'Samples');
  const small = 'style="font-size:10px"';
  rows.forEach(r => {
    const g = F.groups ? F.groups[r.first] : null;
    if (F.groups && g !== last) { if (last !== null) y += 6; if (grouped) s += text(0, y + 11, esc(g), 'class="lab-ink" font-weight="600"'); last = g; }
    for (let c = 0; c < C; c++) {
      const f = r.counts[c] / Math.max(1, r.size), shade = r.counts[c] > 0 ? Math.max(1, Math.min(6, Math.round(f / top * 6))) : 0;
      s += `<rect x="${(ml + cw * c).toFixed(1)}" y="${y.toFixed(1)}" width="${Math.max(2, cw - 1).toFixed(1)}" height="${(rh - 1).toFixed(1)}" fill="var(--r${shade})"><title>${averaged ? '' : 'client '}${r.id}, ${esc(F.classes[c])}: ${Math.round(r.counts[c])} of ${Math.round(r.size)} samples (${(100 * f).toFixed(0)} %)</title></rect>`;
    }
    if (rh >= 10) s += text(ml - 6, y + rh / 2 + 3.5, r.id + (r.unseen ? '*' : ''), `text-anchor="end" class="dim3" ${small}`);
    const bw = rest * r.size / biggest;
    s += `<rect x="${hx.toFixed(1)}" y="${(y + 1.5).toFixed(1)}" width="${Math.max(0, bw).toFixed(1)}" height="${(rh - 4).toFixed(1)}" fill="var(--fill)"/>`;
    if (rh >= 10) s += text(hx + bw + 5, y + rh / 2 + 3.5, Math.round(r.size).toLocaleString('en'), small);
    y += rh;
  });
  if (rh >= 10 && rows.some(r => r.unseen)) { s += text(0, y + 16, '* unseen: not part of training'); y += 20; }
  const sizes = F.sizes, range = `${Math.min(...sizes)} to ${Math.max(...sizes)} training samples`;
  frame(el, w, y + 6, s, C ? `Heat map of ${sizes.length} clients by ${C} classes, with ${range} each.` : `Bars of ${sizes.length} clients with ${range} each.`);
  const most = $('#fed-max');
  if (most) most.textContent = `${(100 * top).toFixed(0)} %`;
}

/* ---------- the fairness plane: accuracy against what predictions tell about the group ---------- */
function plane() {
  const el = $('#plane');
  if (!el) return;
  const names = Object.keys(D.plane), F = D.plane[state.attr] || D.plane[names[0]], list = shown().filter(m => F.dots[m.id]);
  const w = width(el), narrow = w < 620, gap = 56, pw = narrow ? w : (w - gap) / 2, ph = printing ? 240 : narrow ? 270 : 330, ml = 40, mr = 14, mt = 30, mb = 44;
  const panels = [['global', 0, 'Over everybody'], ['local', 1, 'Within clients']], curves = a => Object.entries(F.curves[a] || {});
  const ys = list.map(m => F.dots[m.id][2]).concat(panels.flatMap(([a]) => curves(a).flatMap(([, c]) => c.map(p => p[1]))));
  if (!ys.length) { el.innerHTML = '<p class="empty">No method with counts by group is shown.</p>'; return; }
  const low0 = Math.min(...ys), high0 = Math.max(...ys), pad = .08 * (high0 - low0) || 1, low = Math.max(0, low0 - pad), high = Math.min(100.5, high0 + pad);
  let s = '';
  panels.forEach(([along, k, title], i) => {
    const x0 = narrow ? 0 : i * (pw + gap), y0 = narrow ? i * (ph + 18) : 0, left = x0 + ml, right = x0 + pw - mr, bottom = y0 + ph - mb, top = y0 + mt;
    const most = Math.max(1e-6, ...list.map(m => F.dots[m.id][k]), ...curves(along).flatMap(([, c]) => c.map(p => p[0]))) * 1.05;
    const px = v => left + (right - left) * v / most, py = v => top + (bottom - top) * (high - v) / (high - low), yTicks = ticks(low, high, 6), digits = digitsOf(yTicks);
    s += text(left, y0 + 14, title, 'class="lab-ink" font-weight="600"');
    yTicks.forEach(t => { s += line(left, py(t), right, py(t), 'class="gridl"') + text(left - 7, py(t) + 4, num(t, digits), 'text-anchor="end"'); });
    s += line(left, bottom, right, bottom, 'class="axisl"');
    const xTicks = ticks(0, most, 5), xd = digitsOf(xTicks);
    xTicks.forEach(t => { s += line(px(t), bottom, px(t), bottom + 4, 'class="axisl"') + text(px(t), bottom + 18, num(t, xd), 'text-anchor="middle"'); });
    s += text((left + right) / 2, bottom + 36, 'Told about the group, thousandths of a bit', 'text-anchor="middle"');
    curves(along).forEach(([of, c]) => {
      const far = c[c.length - 1], path = c.map(p => `${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join('L');
      s += `<path d="M${path}L${right.toFixed(1)} ${py(far[1]).toFixed(1)}" fill="none" stroke="var(--ink2)" stroke-width="${of === 'oracle' ? 2 : 1.4}"${of === 'oracle' ? '' : ' stroke-dasharray="5 4"'}><title>${of === 'oracle' ? 'No method can be above this' : 'Any relabelling of the best method'}</title></path>`;
    });
    list.slice().reverse().forEach(m => {
      const d = F.dots[m.id];
      s += group(m, mark(m, px(d[k]), py(d[2]), 5) + `<title>${esc(m.name)}: ${num(d[2], 1)} % at ${num(d[k], 2)} mbit</title>`);
    });
  });
  frame(el, w, narrow ? 2 * ph + 18 : ph, s, 'Accuracy against what predictions tell about the group, over everybody and within clients. ' + list.map(m => `${m.name}: ${num(F.dots[m.id][2], 1)} % at ${num(F.dots[m.id][0], 2)} and ${num(F.dots[m.id][1], 2)} thousandths of a bit`).join(', ') + '.');
}

/* ---------- controls, print ---------- */
$$('fieldset[data-state]').forEach(f => f.addEventListener('change', e => {
  state[f.dataset.state] = f.dataset.state === 'fs' ? +e.target.value : e.target.value;
  if (f.dataset.state === 'x') rewind();
  charts();
}));
function rewind() { state.cursor = 1; $('#cvr').value = 100; }
if ($('#cv')) {
  $('#cvr').addEventListener('input', e => { state.cursor = e.target.value / 100; curves(); });
  $('#cv').addEventListener('mousemove', e => {
    const el = $('#cv'), box = el.getBoundingClientRect(), f = ((e.clientX - box.left) / box.width - el.dataset.from) / (el.dataset.to - el.dataset.from);
    if (f >= 0 && f <= 1) { state.cursor = Math.round(f * 100) / 100; $('#cvr').value = state.cursor * 100; curves(); }
  });
  $('#cv').addEventListener('mouseleave', () => { rewind(); curves(); });
}
if ($('#bands')) $('#bands').addEventListener('change', e => { state.bands = e.target.checked; curves(); });
if ($('#strip')) $('#strip').addEventListener('click', e => {
  const k = e.target.dataset && e.target.dataset.k;
  if (k !== undefined) { state.traced = state.traced === k ? null : k; strip(); }
});
function charts() { curves(); strip(); plane(); federation(); if (state.focus) emphasise(state.focus); }
addEventListener('beforeprint', () => { printing = true; charts(); });
addEventListener('afterprint', () => { printing = false; charts(); });
let drawn = 0;
new ResizeObserver(() => { /* the head's width changes with the window, and nothing drawn changes its height */
  const w = $('main').clientWidth;
  if (!printing && Math.abs(w - drawn) > 2) { drawn = w; charts(); }
}).observe($('.top'));
keys();
charts();
})();
