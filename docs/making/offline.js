// SPDX-License-Identifier: Apache-2.0
// A page that is opened as a file may not start a worker from another file, but may from a text:
// site.py puts the text of the search's worker into search.js, which is read before it starts.
"use strict";
if (location.protocol === "file:") {
  const Started = window.Worker;
  window.Worker = class extends Started {
    constructor() {
      super(URL.createObjectURL(new Blob([__worker], { type: "text/javascript" })));
    }
  };
}
