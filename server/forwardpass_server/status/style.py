"""The style sheet of the status page."""

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--line:#e3e6ea;--text:#16202c;--soft:#5c6b7c;--link:#1559b7;
--good:#137a45;--good-back:#dff3e7;--busy:#8a5a00;--busy-back:#fdf0d1;--bad:#b3261e;--bad-back:#fbe3e1}
@media (prefers-color-scheme:dark){:root{--page:#0f141a;--card:#182029;--line:#2a3541;--text:#e6ebf1;--soft:#93a1b1;
--link:#7db4ff;--good:#6fdca0;--good-back:#123524;--busy:#f2c866;--busy-back:#3a2d0e;--bad:#ff9d95;--bad-back:#431d1a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px}
header{display:flex;flex-wrap:wrap;align-items:center;gap:4px 12px;margin-bottom:20px}
h1{font-size:26px;line-height:1.2;letter-spacing:-.02em;margin:0}
header p{flex-basis:100%;margin:0;color:var(--soft)}
h2{font-size:16px;margin:0 0 12px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin-bottom:16px}
section>p{margin:0;color:var(--soft)}
dl,dd,ul{margin:0;padding:0}
.pill{display:inline-block;border-radius:99px;padding:1px 10px;font-size:13px;font-weight:600;white-space:nowrap}
.pill.good{color:var(--good);background:var(--good-back)}
.pill.busy{color:var(--busy);background:var(--busy-back)}
.pill.bad{color:var(--bad);background:var(--bad-back)}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:12px;margin-bottom:16px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tiles dd{font-size:21px;line-height:1.4;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums;
  white-space:nowrap}
.tiles dt{color:var(--soft);font-size:13px}
table{width:100%;border-collapse:collapse}
th{color:var(--soft);font-size:13px;font-weight:500;text-align:left;padding:0 12px 6px 0;white-space:nowrap}
td{border-top:1px solid var(--line);padding:9px 12px 9px 0;vertical-align:top;overflow-wrap:anywhere}
th.figure,td.figure{text-align:right;padding-right:0;padding-left:12px;white-space:nowrap;font-variant-numeric:tabular-nums}
.versions{list-style:none}
.versions li+li{margin-top:4px}
.versions b{margin-right:4px;font-variant-numeric:tabular-nums}
small{color:var(--soft);font-size:13px}
.columns{display:grid;grid-template-columns:repeat(3,1fr);gap:16px;align-items:start;margin-bottom:16px}
.columns section{margin:0;height:100%}
.facts div{display:flex;justify-content:space-between;gap:12px;padding:6px 0;border-top:1px solid var(--line)}
.facts div:first-child{border-top:0}
.facts dt{color:var(--soft)}
.facts dd{font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap}
.bar{display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 12px;margin-bottom:10px}
.bar span:first-child{color:var(--soft)}
.bar div{flex-basis:100%;height:8px;border-radius:4px;background:var(--line);overflow:hidden}
.bar i{display:block;height:100%;border-radius:4px}
.bar i.good{background:var(--good)}
.bar i.busy{background:var(--busy)}
.bar i.bad{background:var(--bad)}
footer{color:var(--soft);font-size:13px}
a{color:var(--link)}
@media (max-width:860px){
.tiles{grid-template-columns:repeat(3,1fr)}
.columns{grid-template-columns:1fr}
}
@media (max-width:640px){
main{padding:20px 14px}
header p{font-size:13px}
section{padding:16px}
.tiles{grid-template-columns:repeat(2,1fr);gap:10px}
.cards thead{display:none}
.cards,.cards tbody{display:block}
.cards tr{display:grid;grid-template-columns:1fr 1fr;gap:2px 20px;border-top:1px solid var(--line);padding:12px 0}
.cards tr:first-child{border-top:0;padding-top:0}
.cards tr:last-child{padding-bottom:0}
.cards td{grid-column:1/-1;border:0;padding:2px 0}
.cards td.figure{grid-column:auto;display:flex;justify-content:space-between;padding:2px 0;font-size:14px}
.cards td.figure::before{content:attr(data-name);color:var(--soft)}
.dense :is(th,td):nth-child(3),.dense :is(th,td):nth-child(4){display:none}
.dense th{padding-top:0}
.dense td{font-size:14px}
}
"""
"""For narrow and wide screens, light and dark."""
