// The page's start: each file looks after its own part.

import "./chat.js";
import * as connection from "./connection.js";
import { $ } from "./dom.js";
import * as engine from "./engine.js";
import { newChat } from "./keys.js";
import "./panels.js";
import "./settings.js";
import "./sidebar.js";
import * as state from "./state.js";
import "./transfer.js";

$("new-chat").addEventListener("click", newChat);
$("show-help").addEventListener("click", () => $("help").showModal());
await state.load();
document.body.classList.remove("starting");
$("prompt").focus();
connection.watch();
engine.watch();
