"""How the page looks, in light and in dark, on paper too."""

STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#1d2129;--soft:#5b6472;--line:#e3e1dc;--grid:#ecebe7;
--a:#0b6bb5;--b:#c8500a;--good:#12805c;--bad:#b3261e;--heat:11,107,181;--warn:#fdf3e3;--edge:#e0a94a}
@media(prefers-color-scheme:dark){:root{--ground:#14161a;--card:#1c1f25;--ink:#e8eaee;--soft:#a2abb9;--line:#31363f;
--grid:#2a2f37;--a:#63b3ed;--b:#f6a15b;--good:#5fd0a5;--bad:#ff8f85;--heat:99,179,237;--warn:#33291a;--edge:#8a6a2b}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 6px}
p{margin:0 0 10px;max-width:75ch}
.note,.legend,figcaption,.tile small,caption{color:var(--soft);font-size:.86rem}
section,.tiles{margin-top:28px}.note{max-width:none}.tiles+.note{margin-top:12px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:1.7rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile.main b{color:var(--a)}
.tile span,.tile small{display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:20px}
figure{margin:0}figcaption{font-weight:600;color:var(--ink)}
svg{width:100%;height:auto;display:block}
.grid{stroke:var(--grid)}.tick{fill:var(--soft);font-size:11px}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}
.dot.a{fill:var(--a)}.dot.b{fill:var(--b)}.best,.ideal{stroke:var(--soft);stroke-dasharray:4 4}
.bar{fill:var(--a)}.mean{stroke:var(--b);stroke-width:2.5}
.key{margin-right:10px}.key::before{content:"";display:inline-block;width:14px;height:3px;margin-right:5px;
vertical-align:middle;background:var(--a)}.key.b::before{background:var(--b)}
.scroll{overflow:auto;max-height:640px}.whole{max-height:none}.stack>*+*{margin-top:20px}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:6px}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
tbody th{font-weight:500;overflow-wrap:break-word;max-width:22em}.r{text-align:right}
.wide{width:100%}
.matrix td,.matrix thead th{text-align:center;padding:6px 2px;min-width:26px;border:1px solid var(--card)}
.matrix tbody th{overflow-wrap:normal;white-space:nowrap;max-width:180px;overflow:hidden;text-overflow:ellipsis}
.matrix td{background:rgba(var(--heat),var(--share))}.matrix td.full{color:var(--ground)}
.matrix td.hit{outline:2px solid var(--a);outline-offset:-2px}
.matrix .long th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;max-height:160px}
.meter{display:inline-block;width:74px;height:7px;border-radius:4px;background:var(--grid);margin-right:8px;
vertical-align:middle;overflow:hidden}.meter i{display:block;height:100%;background:var(--a)}
.photos{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px;margin-top:12px}
.photos img{width:100%;height:150px;object-fit:cover;border-radius:8px;background:var(--grid);display:block}
.photos figcaption{font-weight:400;overflow-wrap:anywhere;padding-top:5px;line-height:1.4}
.true{color:var(--good)}.said{color:var(--bad)}.path{color:var(--soft);font-size:.78rem}
.warnings{background:var(--warn);border:1px solid var(--edge);border-radius:8px;padding:10px 14px 10px 30px;
margin:0 0 12px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
@media print{section,.tile{break-inside:avoid}.scroll{max-height:none}}
"""
