(function () { /* what every page has: tables that sort, buttons that copy, theme, print, contents that follow */
'use strict';
const $ = (s, r) => (r || document).querySelector(s), $$ = (s, r) => [...(r || document).querySelectorAll(s)];
$$('table.sortable').forEach(table => $$('thead button', table).forEach(button => button.addEventListener('click', () => {
  const th = button.closest('th'), i = [...th.parentNode.children].indexOf(th), now = th.getAttribute('aria-sort');
  const dir = now ? (now === 'ascending' ? 'descending' : 'ascending') : button.dataset.dir === 'asc' ? 'ascending' : 'descending', k = dir === 'ascending' ? 1 : -1;
  $$('thead [aria-sort]', table).forEach(h => h.removeAttribute('aria-sort'));
  th.setAttribute('aria-sort', dir);
  const value = row => { const raw = row.children[i].dataset.v ?? row.children[i].textContent; return raw === '' ? Infinity * k : isNaN(raw.replace(/,/g, '')) ? raw : +raw.replace(/,/g, ''); };
  const body = table.tBodies[0];
  [...body.rows].map((r, j) => [value(r), j, r]).sort((p, q) => (p[0] < q[0] ? -1 : p[0] > q[0] ? 1 : 0) * k || p[1] - q[1]).forEach(r => body.append(r[2]));
  if (table.classList.contains('lb')) table.dataset.sorted = i === 0 && dir === 'ascending' ? 'rank' : 'other';
})));
document.addEventListener('click', e => {
  const copy = e.target.closest('[data-copy]');
  if (copy) {
    const source = $('#' + copy.dataset.copy), done = t => { copy.textContent = t; setTimeout(() => { copy.textContent = 'Copy'; }, 1600); };
    const select = () => { const r = document.createRange(); r.selectNodeContents(source); const s = getSelection(); s.removeAllRanges(); s.addRange(r); done('Selected'); };
    if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(() => done('Copied'), select); else select();
  }
});
const theme = $('#theme'), root = document.documentElement;
theme.value = root.dataset.theme || 'auto';
theme.addEventListener('change', () => {
  if (theme.value === 'auto') delete root.dataset.theme; else root.dataset.theme = theme.value;
  try { localStorage.setItem('consilience-theme', theme.value); } catch (e) { /* a page from a file may not remember */ }
});
$('#print').addEventListener('click', () => print());
const watch = new IntersectionObserver(seen => seen.forEach(e => {
  if (e.isIntersecting) $$('.rail li a').forEach(a => { if (a.getAttribute('href') === '#' + e.target.id) a.setAttribute('aria-current', 'true'); else a.removeAttribute('aria-current'); });
}), {rootMargin: '0px 0px -75% 0px'});
$$('main section').forEach(s => watch.observe(s));
})();
